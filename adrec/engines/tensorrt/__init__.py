"""TensorRT plans as engines: the library's door, profiles, the record beside a plan, and the runner."""

from adrec.engines.tensorrt.capture import CapturedPlan
from adrec.engines.tensorrt.library import TensorRTError, available
from adrec.engines.tensorrt.plan import PlanKey, PlanRecord, read_plan, read_record
from adrec.engines.tensorrt.profiles import Profile, Range, check_profiles, choose_profile, parse_profile, uncovered
from adrec.engines.tensorrt.runner import PlanRunner

__all__ = [
    "CapturedPlan",
    "PlanKey",
    "PlanRecord",
    "PlanRunner",
    "Profile",
    "Range",
    "TensorRTError",
    "available",
    "check_profiles",
    "choose_profile",
    "parse_profile",
    "read_plan",
    "read_record",
    "uncovered",
]
