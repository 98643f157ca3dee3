"""Everything that can be refused, and the HTTP status each refusal has.

ServiceError
├── InvalidImage            400  the bytes are no readable image
├── InvalidForm             400  the multipart body is malformed, breaks off or has too many fields
├── InvalidArchive          400  neither a zip nor a tar, damaged, or with too many files
├── Unauthorized            401  no key, or one that is unknown, expired or revoked
├── Forbidden               403  the key may not do this
├── UnknownModel            404  no such model or version, or no shadow
├── UnknownCalibration      404  no such calibration
├── UnknownSample           404  a calibration has no such sample, or no longer its map
├── UnknownInspection       404  no such inspection is recorded, or no longer
├── ImageNotKept            404  the image of an inspection was not archived, or is gone
├── DigestMismatch          409  another graph than the caller insists on, or than was activated
├── Uncalibrated            409  the model has no threshold, and the request gives none
├── NothingWatched          409  no test of drift: no calibration, or nothing recorded
├── CalibrationFinished     409  it never changes again; or it must be finished first
├── CalibrationInUse        409  what is in force can't be deleted
├── NothingToRollBack       409  nothing was in force before
├── ModelInUse              409  the active version or the shadow can't be unloaded
├── VersionExists           409  a version never changes
├── ModelsNotWritable       409  the models folder can't be written to
├── TooLarge                413  bytes or pixels beyond the limit
├── UnsupportedFormat       415  an image format or pixel type that is not read
├── InvalidParameter        422  a parameter out of its bounds
│   ├── TooFewSamples       422  the asked rate needs more normal images
│   ├── TrainedOn                a sample that the model was trained on; reported, not raised
│   └── BundleRefused       422  a bundle that was sent can't be used
├── Overloaded              429  the queue is full, a calibration or upload under way (Retry-After)
│   └── TooOften            429  more requests than the key allows (Retry-After)
├── InferenceFailed         500  the runtime raised while scoring
│   └── NoNumber            500  a score or a pixel of a map is none
├── NotReady                503  no model yet, or no room on the device (Retry-After)
│   └── DatabaseAway        503  the database doesn't answer; inspection goes on (Retry-After)
├── DeadlineExceeded        504  not answered in time
├── BundleError             500  manifest, digest, interface or self-check; at start, it stops it
├── DeviceUnavailable            at start: the named device can't be had
└── SettingsError                at start: settings that contradict each other
"""


class ServiceError(Exception):
    """A refusal that names the offending value and the limit."""

    status = 500
    title = "Internal error"
    retry_after_s: int | None = None


class InvalidImage(ServiceError):
    status, title = 400, "Image can't be decoded"


class InvalidForm(ServiceError):
    status, title = 400, "Form can't be read"


class InvalidArchive(ServiceError):
    status, title = 400, "Archive can't be read"


class Unauthorized(ServiceError):
    status, title = 401, "Key needed"


class Forbidden(ServiceError):
    status, title = 403, "Key may not do this"


class UnknownModel(ServiceError):
    status, title = 404, "Unknown model"


class UnknownCalibration(ServiceError):
    status, title = 404, "Unknown calibration"


class UnknownSample(ServiceError):
    status, title = 404, "Unknown sample"


class UnknownInspection(ServiceError):
    status, title = 404, "Unknown inspection"


class ImageNotKept(ServiceError):
    status, title = 404, "Image not kept"


class DigestMismatch(ServiceError):
    status, title = 409, "Another graph than was asked for"


class Uncalibrated(ServiceError):
    status, title = 409, "No threshold"


class NothingWatched(ServiceError):
    status, title = 409, "Nothing is watched"


class CalibrationFinished(ServiceError):
    status, title = 409, "Calibration finished, or not yet"


class CalibrationInUse(ServiceError):
    status, title = 409, "Calibration in use"


class NothingToRollBack(ServiceError):
    status, title = 409, "Nothing to roll back"


class ModelInUse(ServiceError):
    status, title = 409, "Model in use"


class VersionExists(ServiceError):
    status, title = 409, "Version exists"


class ModelsNotWritable(ServiceError):
    status, title = 409, "Models folder can't be written to"


class TooLarge(ServiceError):
    status, title = 413, "Too large"


class UnsupportedFormat(ServiceError):
    status, title = 415, "Unsupported format"


class InvalidParameter(ServiceError):
    status, title = 422, "Invalid parameter"


class TooFewSamples(InvalidParameter):
    title = "Too few samples"

    def __init__(self, message: str, *, samples: int, needed: int) -> None:
        super().__init__(message)
        self.samples, self.needed = samples, needed


class TrainedOn(InvalidParameter):
    title = "Trained on"


class BundleRefused(InvalidParameter):
    title = "Bundle refused"


class Overloaded(ServiceError):
    status, title, retry_after_s = 429, "Too much at once", 1


class TooOften(Overloaded):
    title = "Too many requests"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InferenceFailed(ServiceError):
    status, title = 500, "Inference failed"


class NoNumber(InferenceFailed):
    """The runtime itself is well."""


class NotReady(ServiceError):
    status, title, retry_after_s = 503, "Not ready", 5


class DatabaseAway(NotReady):
    title = "Database away or busy"


class DeadlineExceeded(ServiceError):
    status, title = 504, "Deadline exceeded"


class BundleError(ServiceError):
    title = "Bundle can't be used"


class DeviceUnavailable(ServiceError):
    title = "Device can't be had"


class SettingsError(ServiceError):
    title = "Settings contradict each other"
