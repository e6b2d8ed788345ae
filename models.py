"""Builds the model: timm's architectures and the small sample model."""

import ast
import contextlib
import difflib
import re
from collections.abc import Callable, Collection
from pathlib import Path

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from utils import UserError, first_line

default_cfgs = generate_default_cfgs(
    {
        "deit_sample_patch4_28.fashion_mnist": {
            "file": str(
                Path(__file__).resolve().parent / "sample" / "deit_sample_patch4_28.safetensors"
            ),
            "num_classes": 10,
            "input_size": (3, 28, 28),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        }
    }
)

#: `--model-kwargs` refuses names that begin so: other arguments set them, or they load files.
FIXED = ("num_classes", "img_size", "pretrained", "checkpoint", "cache")

#: Options that not every architecture of timm has.
OPTIONAL = ("img_size", "drop_rate", "drop_path_rate")

SAMPLE_SHAPE = {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}


@register_model
def deit_sample_patch4_28(pretrained=False, **kwargs) -> VisionTransformer:
    """A DeiT of 0.7 M parameters for 28 x 28 images; `sample/` has its Fashion-MNIST weights."""
    model_args = {"img_size": 28, **SAMPLE_SHAPE, **kwargs}
    return build_model_with_cfg(
        VisionTransformer, "deit_sample_patch4_28", pretrained, **model_args
    )


def timm_name(name: str) -> str:
    """timm's name of a model in DeiT's repository; any other name unchanged.

    A DeiT III such as `deit_small_patch16_LS` is `deit3_small_patch16_224` in timm. A CaiT such as
    `cait_S24` is `cait_s24_384`: without a size in its name it is for images of 384 pixels.
    """
    if found := re.fullmatch(r"deit_(small|medium|base|large|huge)_patch(14|16)_LS", name):
        return f"deit3_{found[1]}_patch{found[2]}_224"
    if found := re.fullmatch(r"cait_(XXS|XS|S|M)(24|36|48)(_224)?", name):
        size = found[3] or ("_448" if found[2] == "48" else "_384")
        return f"cait_{found[1].lower()}{found[2]}{size}"
    return name


def shape_arguments(assignments: list[str] | None) -> dict:
    """The arguments for `timm.create_model` in `--model-kwargs`: Python literals or strings.

    Raises UserError for an entry that is not KEY=VALUE, and for names that begin as in `FIXED`.
    """
    found = {}
    for assignment in assignments or ():
        name, _, value = assignment.partition("=")
        if not name.isidentifier() or not value or name.startswith(FIXED):
            raise UserError(
                f"--model-kwargs {assignment}: expected KEY=VALUE with an argument of the "
                "architecture, such as embed_dim=64"
            )
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = value
    return found


def build_model(
    name: str,
    num_classes: int,
    input_size: int,
    *,
    drop: float = 0.0,
    drop_path: float = 0.0,
    pretrained: bool = False,
    assignments: list[str] | None = None,
    flag: str = "--model",
) -> torch.nn.Module:
    """timm's model of that name for square images of `input_size` pixels, on the CPU.

    pretrained: load timm's weights for the name; a head for another number of classes is new.
    assignments: the entries of `--model-kwargs`.
    Raises UserError if the name is unknown, the model cannot take the size, or there are no
    weights.
    """
    name = timm_name(name)
    shape = shape_arguments(assignments)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = "timm.list_models() lists the names"
        if close:
            hint = f"did you mean {', '.join(close)}?"
        raise UserError(f"{flag} {name}: timm has no such model; {hint}")

    def create(pretrained):
        options = {
            "pretrained": pretrained,
            "num_classes": num_classes,
            "drop_rate": drop,
            "drop_path_rate": drop_path,
            **shape,
        }
        return create_accepting(name, {"img_size": input_size, **options})[0]

    def check(device: str) -> None:
        # Some architectures notice a wrong size only when they run
        with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
            create(pretrained=False).eval()(torch.zeros(1, 3, input_size, input_size))

    try:
        try:
            check("meta")  # shapes alone, in a fraction of the time
        except Exception:  # of a wrong shape, or of an operation without a meta tensor
            check("cpu")
    except Exception as error:  # each architecture has its own way to refuse
        wanted = f"{flag} {name}"
        if assignments:
            wanted += f" --model-kwargs {' '.join(assignments)}"
        raise UserError(
            f"{wanted} cannot be built for --input-size {input_size} ({first_line(error)})"
        ) from None

    if not pretrained:
        return create(pretrained=False).eval()
    try:
        return create(pretrained=True)
    except Exception as error:  # hub clients raise errors of many libraries
        raise UserError(
            f"no pretrained weights for {flag} {name} ({first_line(error)}); give weights "
            "with --finetune FILE, or start from random ones with --no-pretrained"
        ) from None


def create_accepting(name: str, options: dict) -> tuple[torch.nn.Module, dict]:
    """timm's model with the options that its architecture has, and these options.

    Left out are the image size, which convolutional models lack because they take any, and rates of
    dropout and drop path that are 0. Raises TypeError for any other option that it lacks.
    """
    while True:
        try:
            return timm.create_model(name, **options), options
        except TypeError as error:
            lacks = [option for option in OPTIONAL if f"'{option}'" in str(error)]
            if not lacks or lacks[0] not in options or lacks[0] != "img_size" and options[lacks[0]]:
                raise
            options = {option: value for option, value in options.items() if option != lacks[0]}


def cut_pixels(model: torch.nn.Module, input_size: int) -> str:
    """What the patches of a model leave out of images of a size they do not divide, in a line.

    "" if they leave out nothing, or the model has no such patches.
    """
    embedding = getattr(model, "patch_embed", None)
    sides = getattr(embedding, "patch_size", None)
    pads = getattr(embedding, "dynamic_img_pad", False)
    if not isinstance(sides, tuple) or pads or input_size % sides[0] == 0:
        return ""
    rest = input_size % sides[0]
    return (
        f"--input-size {input_size}: patches of {sides[0]} pixels cover {input_size - rest}; the "
        f"last {rest} pixels at the right and at the bottom are cut off"
    )


def timm_call(
    name: str, num_classes: int, input_size: int, assignments: list[str] | None = None
) -> tuple[str, dict]:
    """Name and arguments for `timm.create_model` to build the same model without this project."""
    name = timm_name(name)
    shape = shape_arguments(assignments)
    arguments = {"num_classes": num_classes, "img_size": input_size, **shape}
    if name == deit_sample_patch4_28.__name__:
        return "deit_tiny_patch16_224", {**arguments, **SAMPLE_SHAPE, **shape}
    with torch.device("meta"):
        return name, create_accepting(name, arguments)[1]


def head_parameters(model: torch.nn.Module) -> list[str]:
    """The names of the classifiers' parameters, a weight first; a distilled model has two."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    ids = {id(parameter) for head in heads for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in ids]


def norm_parameters(model: torch.nn.Module) -> list[str]:
    """The names of the parameters of all normalization layers, and of ResMLP's Affine."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if "Norm" in type(module).__name__ or type(module).__name__ == "Affine"
    ]


def named(pattern: str) -> Callable[[torch.nn.Module], list[str]]:
    """What returns the names of a model's parameters in which the regular expression is found."""

    def matching(model: torch.nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if re.search(pattern, name)]

    return matching


#: The kinds of parameters that `--train-only` may name, each with the function that lists them. A
#: parameter may be of several kinds: the bias of a norm is one of the biases as well.
PARAMETER_KINDS: dict[str, Callable[[torch.nn.Module], list[str]]] = {
    "norms": norm_parameters,
    "biases": named(r"bias$"),
    "head": head_parameters,
    "layerscale": named(r"\b(gamma_?\d?|ls\d)$"),
    "tokens": named(r"\b(cls|dist|reg)_token_?\d?$"),
    "positions": named(
        r"\b(pos_embed|(patch|pixel|rel)_pos|relative_position|attention_biases|(cpb|meta)_mlp)"
    ),
    "patches": named(r"^patch_embed"),
    "attention": named(r"\.attn\."),
}

#: What `--attn-only` trains. Touvron et al. 2022, arXiv:2203.09795.
ATTENTION_ONLY = ("attention", "positions", "head")


def train_only(model: torch.nn.Module, kinds: Collection[str]) -> None:
    """Freezes all parameters but those of some `PARAMETER_KINDS`.

    Frozen parameters have no gradients, and the optimizer has no state for them. Norms, biases and
    head: Zimmer et al. 2023, arXiv:2312.15230.
    Raises UserError if the model has none of these kinds; nothing is frozen then.
    """
    trained = {name for kind in kinds for name in PARAMETER_KINDS[kind](model)}
    if not trained:
        has = [kind for kind, list_names in PARAMETER_KINDS.items() if list_names(model)]
        raise UserError(
            f"--train-only {','.join(kinds)}: the model has no such parameters, so nothing would "
            f"be trained; expected some of {', '.join(has)}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained


def trained_share(model: torch.nn.Module) -> str:
    """How many of how many parameters are trained, in words."""
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g} %)"


def checkpoint_gradients(model: torch.nn.Module, name: str) -> None:
    """Makes a model keep few activations, and compute the others again in the backward pass.

    The results stay the same, drop path and dropout included.
    Raises UserError if timm cannot do it with this architecture.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"--grad-checkpointing: timm's {name} has no gradient checkpointing"
        ) from None


def has_batch_norm(model: torch.nn.Module) -> bool:
    """Whether a model keeps running statistics of batch normalization."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kind) for module in model.modules())


def compile_model(model: torch.nn.Module, mode: str) -> None:
    """Compiles a model in place, so that parameters keep their names, and masks their parameters.

    Each shape of inputs is compiled for itself, since code for any shape is slower. A copy of a
    compiled model is not compiled: it needs a call of its own, which finds the code of the first.

    mode: of torch.compile, one of `compile_modes()`.
    """
    model.compile(dynamic=False, mode=mode)


def compile_modes() -> list[str]:
    """What `--compile-mode` may be, by the torch that is installed."""
    from torch import _inductor  # takes seconds, and few runs need it

    return list(_inductor.list_mode_options())


@contextlib.contextmanager
def without_checkpointing(model: torch.nn.Module):
    """A context in which the backward pass computes no activations again.

    Forward hooks would see them twice.
    """
    checkpoints = getattr(model, "grad_checkpointing", False)
    if checkpoints:
        model.set_grad_checkpointing(False)
    try:
        yield
    finally:
        if checkpoints:
            model.set_grad_checkpointing(True)


def train_both_heads(model: torch.nn.Module, name: str) -> None:
    """Makes a distilled model return the logits of both heads while it trains.

    Raises UserError if the model has no second head.
    """
    if not hasattr(model, "set_distilled_training"):
        raise UserError(
            f"--model {name}: has no distillation head for --distillation-type; expected a "
            "distilled model such as deit_small_distilled_patch16_224"
        )
    model.set_distilled_training(True)
