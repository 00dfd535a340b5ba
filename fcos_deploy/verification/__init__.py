"""Whether this machine gives the certified detections (design, section 7)."""

from fcos_deploy.verification.log import write_record
from fcos_deploy.verification.records import VerificationRecord, VerifyOptions, record_verdicts, require_verified
from fcos_deploy.verification.verify import verify_bundle

__all__ = [
    "VerificationRecord",
    "VerifyOptions",
    "record_verdicts",
    "require_verified",
    "verify_bundle",
    "write_record",
]
