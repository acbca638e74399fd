"""The LoRA formats: one file each, and the table of them.

Every change answers `change(weight)`: the difference that scale 1.0 adds to the pristine weight, as a float32 tensor of
the weight's shape on the weight's device. The scale multiplies this change, for all formats alike (as A1111 and
ComfyUI do), so a scale of 0 is always the base model and a negative one inverts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sdxl_worker.errors import LoraIncompatible
from sdxl_worker.lora.formats.decomposed import DECOMPOSED
from sdxl_worker.lora.formats.difference import DIFFERENCE, NORM_DIFFERENCE
from sdxl_worker.lora.formats.format import WEIGHT, Change, Format, Shapes
from sdxl_worker.lora.formats.generalized import GENERALIZED
from sdxl_worker.lora.formats.hadamard import HADAMARD
from sdxl_worker.lora.formats.kronecker import KRONECKER
from sdxl_worker.lora.formats.low_rank import LOW_RANK
from sdxl_worker.lora.formats.orthogonal import ORTHOGONAL

# In the order in which a mixed file's name lists them.
FORMATS: tuple[Format, ...] = (
    LOW_RANK,
    DECOMPOSED,
    HADAMARD,
    KRONECKER,
    ORTHOGONAL,
    GENERALIZED,
    DIFFERENCE,
    NORM_DIFFERENCE,
)
# Every format may have one, so it belongs to none.
ALPHA = "alpha"
SUFFIXES: Mapping[str, str] = {ALPHA: r"\.alpha"} | {
    role: pattern for entry in FORMATS for role, pattern in entry.suffixes.items()
}


def build_changes(module: str, tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Change]:
    """The changes of one module's `weight` and `bias` from its tensors by role, `alpha` left out.

    `alpha` is what the file says of this module, None where it says nothing. Raises LoraIncompatible, naming the
    module, when a tensor is missing or left over.
    """
    left = dict(tensors)
    changes: dict[str, Change] = {}
    for entry in sorted(FORMATS, key=lambda entry: entry.wraps):
        if not entry.marks & left.keys():
            continue
        own = {role: left.pop(role) for role in entry.suffixes if role in left}
        try:
            built = entry.build(own, alpha, changes.get(WEIGHT))
        except KeyError as missing:
            raise LoraIncompatible(f"the tensor {missing.args[0]!r} of the LoRA module {module!r} is missing") from None
        if not entry.wraps and built.keys() & changes.keys():
            raise _misfit(module, tensors)
        changes |= built
    if left:
        raise _misfit(module, tensors)
    return changes


def _misfit(module: str, tensors: Mapping[str, Tensor]) -> LoraIncompatible:
    roles = ", ".join(sorted(tensors))
    return LoraIncompatible(f"the LoRA module {module!r} has tensors that do not go together: {roles}")


def format_name(modules: Sequence[Shapes]) -> str:
    """What people call the format of a file, from each module's shapes by role; "" for none, `A + B` for several."""
    names = []
    for entry in FORMATS:
        if own := [shapes for shapes in modules if entry.marks & shapes.keys()]:
            names.append(entry.name(own))
    return " + ".join(name for name in names if name)


def rank_of(shapes: Shapes) -> int | None:
    """The rank of a module by its shapes by role, None where they do not say."""
    roles = (role for entry in FORMATS for role in entry.rank)
    return next((shapes[role][0] for role in roles if shapes.get(role)), None)


def input_width(shapes: Shapes) -> int | None:
    """The input width of the module that is changed by its shapes by role, None where they do not say."""
    widths = (entry.width(shapes) for entry in FORMATS)
    return next((width for width in widths if width is not None), None)
