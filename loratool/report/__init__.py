"""What the commands return: plain data, no torch.

Every report has `to_json`: the object that ``--json`` prints.  Its keys are the field names,
after ``schema``, ``command`` and ``ok``; they are stable within one schema number.
Shares and errors are fractions of 1, sizes are bytes, times are seconds.
"""

from loratool.report.algebra import (
    RescaledAdapter,
    RescaleReport,
    SumModuleReport,
    share_of,
)
from loratool.report.base import SCHEMA, Loads, Report, plain_json
from loratool.report.combine import CombineReport, DifferenceReport
from loratool.report.compare import (
    ComparedFamily,
    ComparedModule,
    ComparedReplacement,
    CompareReport,
    Difference,
)
from loratool.report.compress import (
    CompressedAdapter,
    CompressedFamily,
    CompressedModule,
    CompressReport,
    energy_and_error,
)
from loratool.report.convert import ConvertedAdapter, ConvertReport
from loratool.report.extract import (
    ExtractedFamily,
    ExtractedModule,
    ExtractReport,
    SavedResidual,
    group_families,
)
from loratool.report.inspect import (
    AdapterSummary,
    CheckpointSummary,
    FolderRow,
    InspectReport,
    ReplacedTensor,
    TargetFamily,
    TensorRow,
)
from loratool.report.merge import (
    MergeReport,
    ModuleLoss,
    SubtractReport,
    SwapReport,
    TensorDifference,
    VerifyReport,
)
from loratool.report.run import RunReport, StepReport
from loratool.report.spectrum import AdapterSpectrum, FamilySpectrum, ModuleSpectrum

__all__ = [
    "SCHEMA",
    "AdapterSpectrum",
    "AdapterSummary",
    "CheckpointSummary",
    "CombineReport",
    "CompareReport",
    "ComparedFamily",
    "ComparedModule",
    "ComparedReplacement",
    "CompressReport",
    "CompressedAdapter",
    "CompressedFamily",
    "CompressedModule",
    "ConvertReport",
    "ConvertedAdapter",
    "Difference",
    "DifferenceReport",
    "ExtractReport",
    "ExtractedFamily",
    "ExtractedModule",
    "FamilySpectrum",
    "FolderRow",
    "InspectReport",
    "Loads",
    "MergeReport",
    "ModuleLoss",
    "ModuleSpectrum",
    "ReplacedTensor",
    "Report",
    "RescaleReport",
    "RescaledAdapter",
    "RunReport",
    "SavedResidual",
    "StepReport",
    "SubtractReport",
    "SumModuleReport",
    "SwapReport",
    "TargetFamily",
    "TensorDifference",
    "TensorRow",
    "VerifyReport",
    "energy_and_error",
    "group_families",
    "plain_json",
    "share_of",
]
