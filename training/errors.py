"""What training refuses, with the offending value and the limit in the message."""


class TrainingError(Exception):
    """Bad data, weights, settings or a checkpoint that does not fit; printed, never a traceback."""
