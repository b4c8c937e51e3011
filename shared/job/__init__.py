"""The job: one training task, described by the server's job file and sent to every client.

One source for all settings: YAML on disk, JSON on the wire, a SHA-256 digest of the canonical JSON in invitations and
handshakes, so that no setting can be changed between operator and client. Names are those of Hugging Face and peft
where those exist.
"""

from shared.job.aggregation import Adaptive, Aggregation, AnyKrum, FedAvg, FedAvgM, FedSgd, Scaffold, TrimmedMean
from shared.job.job import Job, load_job, parse_job
from shared.job.methods import Full, Lora, Method, MethodName, Prefix, Prompt, TrainedPart, Training
from shared.job.privacy import CentralPrivacy, GaussianPrivacy, LocalPrivacy, NoPrivacy, Privacy
from shared.job.rounds import Cohort, Data, Rounds, Split, Wire, WireFormat
from shared.job.secure import Secure

__all__ = [
    "Adaptive",
    "Aggregation",
    "AnyKrum",
    "CentralPrivacy",
    "Cohort",
    "Data",
    "FedAvg",
    "FedAvgM",
    "FedSgd",
    "Full",
    "GaussianPrivacy",
    "Job",
    "LocalPrivacy",
    "Lora",
    "Method",
    "MethodName",
    "NoPrivacy",
    "Prefix",
    "Privacy",
    "Prompt",
    "Rounds",
    "Scaffold",
    "Secure",
    "Split",
    "TrainedPart",
    "Training",
    "TrimmedMean",
    "Wire",
    "WireFormat",
    "load_job",
    "parse_job",
]
