"""actsteer: steer any torch model by editing its activations while it runs, phi_l(x) + c · v.

model + data --collect--> Statistics --estimator--> SteeringVector --> VectorBank --> Steerer(model) --with--> forward
"""

import actsteer.private_names  # noqa: F401  (first, for it refuses a torch that is too old)
from actsteer.collecting.classes import ClassStatistics
from actsteer.collecting.collect import collect
from actsteer.collecting.moments import Moments
from actsteer.collecting.pairs import CrossMoments, collect_differences, collect_pairs
from actsteer.collecting.record import record
from actsteer.collecting.statistics import Statistics
from actsteer.errors import (
    ActsteerError,
    AttachedError,
    BatchError,
    ConceptNotFoundError,
    DistributedError,
    FileFormatError,
    GateError,
    LossError,
    ModelMismatchError,
    NotFoldable,
    OutputError,
    PositionsError,
    ShapeError,
    SiteNotFoundError,
    StatisticsError,
    SteeringNotApplied,
    StrengthError,
    UnsupportedModelError,
    ZeroDirectionError,
)
from actsteer.estimators.align import align
from actsteer.estimators.centroids import Centroids
from actsteer.estimators.concept_erasure import ConceptErasure
from actsteer.estimators.discover import discover
from actsteer.estimators.estimator import Estimator
from actsteer.estimators.fit import fit
from actsteer.estimators.layer_mean import LayerMean
from actsteer.estimators.logistic_direction import LogisticDirection
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.estimators.moment_matching import MomentMatching
from actsteer.estimators.null_space import NullSpace
from actsteer.estimators.optimize import optimize
from actsteer.estimators.principal_direction import PrincipalDirection
from actsteer.estimators.retention import Retain
from actsteer.estimators.ridge_direction import RidgeDirection
from actsteer.estimators.rows import Rows
from actsteer.estimators.sparse_feature import SparseFeature
from actsteer.estimators.validation import Validation
from actsteer.estimators.whitened_mean_difference import WhitenedMeanDifference
from actsteer.files.formats import FORMATS, Format
from actsteer.sites.resolve import find_sites
from actsteer.steering.folding.fold import fold, unfold
from actsteer.steering.gates.cosine_above import CosineAbove
from actsteer.steering.gates.gate import Combination, Gate, ScoredGate
from actsteer.steering.gates.logic import And, Not, Or
from actsteer.steering.gates.probe_above import ProbeAbove
from actsteer.steering.gates.projection_above import ProjectionAbove
from actsteer.steering.gates.soft import Soft
from actsteer.steering.interventions.ablate import Ablate
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.affine import Affine
from actsteer.steering.interventions.chain import Chain
from actsteer.steering.interventions.clamp import Clamp
from actsteer.steering.interventions.intervention import Edit, Intervention, PerSite
from actsteer.steering.interventions.keep_norm import KeepNorm
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.steering.interventions.replace import Replace
from actsteer.steering.interventions.rotate import Rotate
from actsteer.steering.steerer import Steerer
from actsteer.tuning.sweep import sweep
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.site_map import SiteMap
from actsteer.vectors.vector import SteeringVector

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Ablate",
    "ActsteerError",
    "Add",
    "Affine",
    "And",
    "AttachedError",
    "BatchError",
    "Centroids",
    "Chain",
    "Clamp",
    "ClassStatistics",
    "Combination",
    "ConceptErasure",
    "ConceptNotFoundError",
    "CosineAbove",
    "CrossMoments",
    "DistributedError",
    "Edit",
    "Estimator",
    "FileFormatError",
    "Format",
    "Gate",
    "GateError",
    "Intervention",
    "KeepNorm",
    "LayerMean",
    "LogisticDirection",
    "LossError",
    "LowRank",
    "MeanDifference",
    "ModelMismatchError",
    "MomentMatching",
    "Moments",
    "Not",
    "NotFoldable",
    "NullSpace",
    "Or",
    "OutputError",
    "PerSite",
    "PositionsError",
    "PrincipalDirection",
    "ProbeAbove",
    "ProjectionAbove",
    "Replace",
    "Retain",
    "RidgeDirection",
    "Rotate",
    "Rows",
    "ScoredGate",
    "ShapeError",
    "SiteMap",
    "SiteNotFoundError",
    "Soft",
    "SparseFeature",
    "Statistics",
    "StatisticsError",
    "Steerer",
    "SteeringNotApplied",
    "SteeringVector",
    "StrengthError",
    "UnsupportedModelError",
    "Validation",
    "VectorBank",
    "WhitenedMeanDifference",
    "ZeroDirectionError",
    "align",
    "collect",
    "collect_differences",
    "collect_pairs",
    "discover",
    "find_sites",
    "fit",
    "fold",
    "optimize",
    "record",
    "sweep",
    "unfold",
]
