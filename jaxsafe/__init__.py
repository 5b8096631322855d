"""Where does a language model's safety live, how easily does it break, and where does it refuse too much?"""

import importlib
import pathlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# An installation has launch/ and configs/ inside the package; in a clone they stand beside it.
if not (pathlib.Path(__file__).parent / "launch").is_dir():
    __path__.append(str(pathlib.Path(__file__).parents[1]))

# What type checkers read; the test of the public names holds it against the table below.
if TYPE_CHECKING:
    from jaxsafe.chat.answers import Answers as Answers
    from jaxsafe.chat.mending import Mending as Mending
    from jaxsafe.chat.model import ChatModel as ChatModel
    from jaxsafe.chat.model import load_chat_model as load_chat_model
    from jaxsafe.chat.steered import Steered as Steered
    from jaxsafe.chat.tokenizer import Tokenizer as Tokenizer
    from jaxsafe.evaluation.judges.keyword import judge as judge
    from jaxsafe.evaluation.settings import setting as setting
    from jaxsafe.evaluation.stats import mcnemar as mcnemar
    from jaxsafe.evaluation.stats import rate as rate
    from jaxsafe.io.hf import save_hf as save_hf
    from jaxsafe.io.hub import Adapted as Adapted
    from jaxsafe.io.hub import load_hf as load_hf
    from jaxsafe.io.hub import resolve as resolve
    from jaxsafe.io.masks import load_mask as load_mask
    from jaxsafe.io.masks import load_scores as load_scores
    from jaxsafe.io.masks import save_mask as save_mask
    from jaxsafe.io.masks import save_scores as save_scores
    from jaxsafe.io.peft import save_peft as save_peft
    from jaxsafe.io.soft_prompts import load_soft_prompt as load_soft_prompt
    from jaxsafe.io.soft_prompts import save_soft_prompt as save_soft_prompt
    from jaxsafe.io.store import Store as Store
    from jaxsafe.io.sums import sums_once as sums_once
    from jaxsafe.io.vectors import load_control_vector as load_control_vector
    from jaxsafe.io.vectors import load_steering as load_steering
    from jaxsafe.io.vectors import load_vectors as load_vectors
    from jaxsafe.io.vectors import save_control_vector as save_control_vector
    from jaxsafe.io.vectors import save_steering as save_steering
    from jaxsafe.kernels.ablation import ablation as ablation
    from jaxsafe.kernels.ablation import orthogonalised as orthogonalised
    from jaxsafe.kernels.actions import Ablate as Ablate
    from jaxsafe.kernels.actions import Add as Add
    from jaxsafe.kernels.actions import Clamp as Clamp
    from jaxsafe.kernels.actions import Gated as Gated
    from jaxsafe.kernels.actions import named_span as named_span
    from jaxsafe.kernels.blocks import range_of as range_of
    from jaxsafe.kernels.directions import difference as difference
    from jaxsafe.kernels.directions import moved as moved
    from jaxsafe.kernels.directions import random_direction as random_direction
    from jaxsafe.kernels.forward import capture as capture
    from jaxsafe.kernels.freezing import freeze as freeze
    from jaxsafe.kernels.freezing import outside as outside
    from jaxsafe.kernels.freezing import rewind as rewind
    from jaxsafe.kernels.generate import generate as generate
    from jaxsafe.kernels.importance import snip_scores as snip_scores
    from jaxsafe.kernels.importance import wanda_scores as wanda_scores
    from jaxsafe.kernels.lora import LoRA as LoRA
    from jaxsafe.kernels.lora import merge_adapters as merge_adapters
    from jaxsafe.kernels.lowrank import act_svd as act_svd
    from jaxsafe.kernels.lowrank import remove_orthogonal as remove_orthogonal
    from jaxsafe.kernels.lowrank import remove_ranks as remove_ranks
    from jaxsafe.kernels.lowrank import subspace_similarity as subspace_similarity
    from jaxsafe.kernels.sampling import Decoding as Decoding
    from jaxsafe.kernels.sampling import Sampling as Sampling
    from jaxsafe.kernels.selection import apply_mask as apply_mask
    from jaxsafe.kernels.selection import bottom as bottom
    from jaxsafe.kernels.selection import jaccard as jaccard
    from jaxsafe.kernels.selection import set_difference as set_difference
    from jaxsafe.kernels.selection import top as top
    from jaxsafe.kernels.steering import Steering as Steering
    from jaxsafe.kernels.sums import Scoring as Scoring
    from jaxsafe.kernels.sums import Statistics as Statistics
    from jaxsafe.kernels.sums import gather as gather
    from jaxsafe.kernels.sums import merge as merge
    from jaxsafe.kernels.units import Units as Units
    from jaxsafe.kernels.units import head_mask as head_mask
    from jaxsafe.kernels.units import layer_mask as layer_mask
    from jaxsafe.kernels.units import unit_mask as unit_mask
    from jaxsafe.methods.brittleness import Material as Material
    from jaxsafe.methods.brittleness import Point as Point
    from jaxsafe.methods.brittleness import ScoreSettings as ScoreSettings
    from jaxsafe.methods.brittleness import edited as edited
    from jaxsafe.methods.decoders import safe_decoding as safe_decoding
    from jaxsafe.methods.decoders import self_cd as self_cd
    from jaxsafe.methods.defences import Keep as Keep
    from jaxsafe.methods.dro import dro as dro
    from jaxsafe.methods.evidence import Evidence as Evidence
    from jaxsafe.methods.evidence import evidence_once as evidence_once
    from jaxsafe.methods.gate_fits import fitted as fitted
    from jaxsafe.methods.gate_fits import logistic as logistic
    from jaxsafe.methods.gate_fits import projection as projection
    from jaxsafe.methods.remedies import REMEDIES as REMEDIES
    from jaxsafe.methods.remedies import Bench as Bench
    from jaxsafe.methods.remedies import RemedyFit as RemedyFit
    from jaxsafe.methods.safe_align import safe_align as safe_align
    from jaxsafe.methods.scans import Prepared as Prepared
    from jaxsafe.methods.scans import find_directions as find_directions
    from jaxsafe.methods.scans import steering_of as steering_of
    from jaxsafe.methods.scans_calibration import Calibration as Calibration
    from jaxsafe.methods.scans_calibration import OpenChoice as OpenChoice
    from jaxsafe.methods.scans_preparation import prepare_scans as prepare_scans
    from jaxsafe.methods.ssah import Role as Role
    from jaxsafe.methods.ssah import RoleShares as RoleShares
    from jaxsafe.methods.ssah import random_units as random_units
    from jaxsafe.methods.ssah import role_transfer as role_transfer
    from jaxsafe.methods.ssah import unit_roles as unit_roles
    from jaxsafe.methods.ssah import unit_scores as unit_scores
    from jaxsafe.methods.ssah import units_of as units_of
    from jaxsafe.methods.ssah import without_units as without_units
    from jaxsafe.methods.together import Training as Training
    from jaxsafe.methods.together import train_together as train_together
    from jaxsafe.methods.trainer import FineTuning as FineTuning
    from jaxsafe.methods.trainer import train as train
    from jaxsafe.methods.trainer import trained as trained
    from jaxsafe.methods.unit_inputs import InputMoments as InputMoments
    from jaxsafe.methods.unit_inputs import input_moments as input_moments
    from jaxsafe.methods.visage import visage as visage
    from jaxsafe.model.config import ModelConfig as ModelConfig
    from jaxsafe.model.layers import LayerRange as LayerRange
    from jaxsafe.model.taps import At as At
    from jaxsafe.model.taps import Edit as Edit
    from jaxsafe.model.taps import SquareSum as SquareSum
    from jaxsafe.model.taps import at as at
    from jaxsafe.model.taps import edit as edit
    from jaxsafe.model.transformer import Transformer as Transformer
    from jaxsafe.model.transformer import forward as forward
    from jaxsafe.model.transformer import init as init
    from jaxsafe.model.weights import hf_view as hf_view
    from jaxsafe.parallel import parse_mesh as parse_mesh
    from jaxsafe.parallel import per_device as per_device
    from jaxsafe.prompts.sets import PromptSet as PromptSet
    from jaxsafe.prompts.sets import check_disjoint as check_disjoint
    from jaxsafe.prompts.sets import load_prompts as load_prompts
    from jaxsafe.records.run import Variant as Variant
    from jaxsafe.records.run import json_schema as json_schema
    from jaxsafe.records.run import read_run as read_run
    from jaxsafe.records.run import read_samples as read_samples
    from jaxsafe.records.scans import Choice as Choice
    from jaxsafe.report.write import write_report as write_report
    from jaxsafe.rows import Batch as Batch
    from jaxsafe.rows import Row as Row
    from jaxsafe.rows import pad_rows as pad_rows
    from jaxsafe.study.exam import Exam as Exam
    from jaxsafe.study.record import record as record
    from jaxsafe.study.record import write_run as write_run
    from jaxsafe.study.study import Study as Study

# Public name -> where it lives; imported on first use, so that `import jaxsafe` costs little.
_WHERE = {
    "ModelConfig": "jaxsafe.model.config",
    "Transformer": "jaxsafe.model.transformer",
    "forward": "jaxsafe.model.transformer",
    "init": "jaxsafe.model.transformer",
    "hf_view": "jaxsafe.model.weights",
    "Edit": "jaxsafe.model.taps",
    "edit": "jaxsafe.model.taps",
    "at": "jaxsafe.model.taps",
    "At": "jaxsafe.model.taps",
    "SquareSum": "jaxsafe.model.taps",
    "load_hf": "jaxsafe.io.hub",
    "Adapted": "jaxsafe.io.hub",
    "save_peft": "jaxsafe.io.peft",
    "resolve": "jaxsafe.io.hub",
    "save_hf": "jaxsafe.io.hf",
    "ChatModel": "jaxsafe.chat.model",
    "load_chat_model": "jaxsafe.chat.model",
    "Answers": "jaxsafe.chat.answers",
    "Steered": "jaxsafe.chat.steered",
    "Tokenizer": "jaxsafe.chat.tokenizer",
    "Batch": "jaxsafe.rows",
    "Row": "jaxsafe.rows",
    "PromptSet": "jaxsafe.prompts.sets",
    "load_prompts": "jaxsafe.prompts.sets",
    "check_disjoint": "jaxsafe.prompts.sets",
    "parse_mesh": "jaxsafe.parallel",
    "capture": "jaxsafe.kernels.forward",
    "generate": "jaxsafe.kernels.generate",
    "Decoding": "jaxsafe.kernels.sampling",
    "Sampling": "jaxsafe.kernels.sampling",
    "Steering": "jaxsafe.kernels.steering",
    "gather": "jaxsafe.kernels.sums",
    "Scoring": "jaxsafe.kernels.sums",
    "Statistics": "jaxsafe.kernels.sums",
    "merge": "jaxsafe.kernels.sums",
    "range_of": "jaxsafe.kernels.blocks",
    "wanda_scores": "jaxsafe.kernels.importance",
    "snip_scores": "jaxsafe.kernels.importance",
    "top": "jaxsafe.kernels.selection",
    "bottom": "jaxsafe.kernels.selection",
    "set_difference": "jaxsafe.kernels.selection",
    "apply_mask": "jaxsafe.kernels.selection",
    "jaccard": "jaxsafe.kernels.selection",
    "act_svd": "jaxsafe.kernels.lowrank",
    "remove_ranks": "jaxsafe.kernels.lowrank",
    "difference": "jaxsafe.kernels.directions",
    "moved": "jaxsafe.kernels.directions",
    "random_direction": "jaxsafe.kernels.directions",
    "visage": "jaxsafe.methods.visage",
    "ablation": "jaxsafe.kernels.ablation",
    "orthogonalised": "jaxsafe.kernels.ablation",
    "remove_orthogonal": "jaxsafe.kernels.lowrank",
    "subspace_similarity": "jaxsafe.kernels.lowrank",
    "save_mask": "jaxsafe.io.masks",
    "load_mask": "jaxsafe.io.masks",
    "save_scores": "jaxsafe.io.masks",
    "load_scores": "jaxsafe.io.masks",
    "Store": "jaxsafe.io.store",
    "sums_once": "jaxsafe.io.sums",
    "per_device": "jaxsafe.parallel",
    "judge": "jaxsafe.evaluation.judges.keyword",
    "rate": "jaxsafe.evaluation.stats",
    "mcnemar": "jaxsafe.evaluation.stats",
    "find_directions": "jaxsafe.methods.scans",
    "steering_of": "jaxsafe.methods.scans",
    "prepare_scans": "jaxsafe.methods.scans_preparation",
    "Calibration": "jaxsafe.methods.scans_calibration",
    "evidence_once": "jaxsafe.methods.evidence",
    "Evidence": "jaxsafe.methods.evidence",
    "fitted": "jaxsafe.methods.gate_fits",
    "logistic": "jaxsafe.methods.gate_fits",
    "projection": "jaxsafe.methods.gate_fits",
    "Gated": "jaxsafe.kernels.actions",
    "Add": "jaxsafe.kernels.actions",
    "Ablate": "jaxsafe.kernels.actions",
    "Clamp": "jaxsafe.kernels.actions",
    "named_span": "jaxsafe.kernels.actions",
    "Mending": "jaxsafe.chat.mending",
    "Bench": "jaxsafe.methods.remedies",
    "RemedyFit": "jaxsafe.methods.remedies",
    "REMEDIES": "jaxsafe.methods.remedies",
    "self_cd": "jaxsafe.methods.decoders",
    "safe_decoding": "jaxsafe.methods.decoders",
    "dro": "jaxsafe.methods.dro",
    "safe_align": "jaxsafe.methods.safe_align",
    "OpenChoice": "jaxsafe.methods.scans_calibration",
    "Prepared": "jaxsafe.methods.scans",
    "Choice": "jaxsafe.records.scans",
    "pad_rows": "jaxsafe.rows",
    "load_steering": "jaxsafe.io.vectors",
    "load_vectors": "jaxsafe.io.vectors",
    "save_steering": "jaxsafe.io.vectors",
    "save_control_vector": "jaxsafe.io.vectors",
    "save_soft_prompt": "jaxsafe.io.soft_prompts",
    "load_soft_prompt": "jaxsafe.io.soft_prompts",
    "load_control_vector": "jaxsafe.io.vectors",
    "freeze": "jaxsafe.kernels.freezing",
    "outside": "jaxsafe.kernels.freezing",
    "rewind": "jaxsafe.kernels.freezing",
    "LoRA": "jaxsafe.kernels.lora",
    "merge_adapters": "jaxsafe.kernels.lora",
    "Training": "jaxsafe.methods.together",
    "train_together": "jaxsafe.methods.together",
    "FineTuning": "jaxsafe.methods.trainer",
    "train": "jaxsafe.methods.trainer",
    "trained": "jaxsafe.methods.trainer",
    "Material": "jaxsafe.methods.brittleness",
    "ScoreSettings": "jaxsafe.methods.brittleness",
    "Point": "jaxsafe.methods.brittleness",
    "edited": "jaxsafe.methods.brittleness",
    "Keep": "jaxsafe.methods.defences",
    "LayerRange": "jaxsafe.model.layers",
    "layer_mask": "jaxsafe.kernels.units",
    "head_mask": "jaxsafe.kernels.units",
    "Units": "jaxsafe.kernels.units",
    "unit_mask": "jaxsafe.kernels.units",
    "input_moments": "jaxsafe.methods.unit_inputs",
    "InputMoments": "jaxsafe.methods.unit_inputs",
    "unit_scores": "jaxsafe.methods.ssah",
    "unit_roles": "jaxsafe.methods.ssah",
    "RoleShares": "jaxsafe.methods.ssah",
    "Role": "jaxsafe.methods.ssah",
    "units_of": "jaxsafe.methods.ssah",
    "without_units": "jaxsafe.methods.ssah",
    "random_units": "jaxsafe.methods.ssah",
    "role_transfer": "jaxsafe.methods.ssah",
    "write_report": "jaxsafe.report.write",
    "Variant": "jaxsafe.records.run",
    "json_schema": "jaxsafe.records.run",
    "read_run": "jaxsafe.records.run",
    "read_samples": "jaxsafe.records.run",
    "setting": "jaxsafe.evaluation.settings",
    "Exam": "jaxsafe.study.exam",
    "Study": "jaxsafe.study.study",
    "record": "jaxsafe.study.record",
    "write_run": "jaxsafe.study.record",
}
__all__ = ["__version__", *_WHERE]


if not TYPE_CHECKING:  # which would take every unknown name for Any

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'jaxsafe' has no attribute {name!r}")
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
