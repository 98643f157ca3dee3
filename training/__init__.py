"""From normal images to a checkpoint, a bundle and a report."""
