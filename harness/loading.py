"""Loading: a model and its adapter, by a hub name, a folder, or an iteration of a run.

Safetensors only, no remote code. Weights that are missing or do not fit are refused, since a model
that is partly loaded would answer all the same.
"""
import logging
import sys
import warnings
from pathlib import Path

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package nobody needs
from huggingface_hub import utils as hub_utils
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from harness.files import digest, read_json, sha256

# Our own errors say which weights are missing, and what could not be fetched.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
hub_utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's


def load(model, adapter=None, bits=None, device=None):
    """A frozen base model in eval mode, with its LoRA adapter if there is one, and its tokenizer.

    model: a hub name, a model folder, or an iteration's folder (runs/x/iter4) or an adapter's,
    which name their base themselves. bits: 4 (NF4), 16 (bfloat16) or 32; default: those of the run
    for an iteration, else 4 on CUDA and 32 elsewhere. Safetensors only, no remote code. Raises
    ValueError for weights that are missing or do not fit, since a partly loaded adapter would
    silently do nothing, and for an adapter of a run that is not what the run has written.
    """
    if adapter is None:
        adapter = adapter_of(model)
        if adapter is not None:
            model = base_of(adapter)
            if bits is None:  # an adapter belongs to the precision it was trained in
                bits = config_of(adapter).get("settings", {}).get("bits")
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ValueError(f"adapter {adapter} has no adapter_model.safetensors")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model)
    network = load_base(model, bits or (4 if device == "cuda" else 32), device)
    if adapter is not None:
        if (Path(adapter) / "tokenizer_config.json").is_file():  # adapters of other tools
            tokenizer = AutoTokenizer.from_pretrained(adapter)
            if len(tokenizer) > network.get_input_embeddings().num_embeddings:
                raise ValueError(f"adapter {adapter}: its tokenizer has tokens that {model} does "
                                 "not have: merge it into that with the tool that made it")
        # Keys that do not fit are named by check_adapter.
        network = PeftModel.from_pretrained(network, str(adapter), ignore_mismatched_sizes=True)
        check_adapter(network, adapter)
    return network.eval(), tokenizer


def load_base(model, bits, device):
    """The frozen weights of a model."""
    dtype = torch.float32 if bits == 32 or bits == 4 and device == "cpu" else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    # A bare "cuda" would be the first GPU in the threads that load.
    place = torch.cuda.current_device() if device == "cuda" else device
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, quantization_config=nf4 if bits == 4 else None,
            device_map={"": place}, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {model} cannot be loaded ({error})") from None
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        raise ValueError(f"model {model}: {kind} is no decoder that takes and gives text alone: "
                         "choose another model") from None
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:  # transformers has drawn these at random
        raise ValueError(f"model {model} cannot be loaded: {len(wrong)} of its weights are "
                         f"missing or of another shape, the first is {wrong[0]}")
    for module in network.modules():
        # bitsandbytes would repack weights while sampling, and gradients do not pass such.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return network.requires_grad_(False)


def adapter_of(model):
    """The adapter's folder of an iteration (runs/x/iter4), or of itself; None for other models."""
    return next((place for place in (Path(model) / "adapter", Path(model))
                 if (place / "adapter_config.json").is_file()), None)


def config_of(model):
    """The config.json of the run that an iteration, or its adapter, belongs to; {} if it has none.
    """
    place = Path(model).resolve()
    file = (place.parent if place.name == "adapter" else place).parent / "config.json"
    content = read_json(file, dict)
    return content if isinstance(content.get("settings"), dict) else {}


def base_of(adapter):
    """The model an adapter was made on: a hub name, or a folder.

    A folder may be named as it is seen from any folder above the adapter. Where it is gone, one of
    the same name in such a folder is taken, since a run and its base may be moved together, and a
    line says so. Raises ValueError if there is none.
    """
    try:
        name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    except (TypeError, ValueError, KeyError):
        name = None
    if not isinstance(name, str):
        raise ValueError(f"adapter {adapter}: its adapter_config.json is damaged, or names no "
                         "base model")
    parts, known = Path(name).parts, Path(name).is_absolute()
    ends = [Path(*parts[i:]) for i in range(len(parts) if known else 1)]
    for place in (above / end for end in ends for above in Path(adapter).resolve().parents):
        if "model_type" in read_json(place / "config.json", dict, notes=[]):  # a run has none
            if known and place != Path(name):
                print(f"{name} is gone: {place} is taken as the adapter's base", file=sys.stderr)
            return str(place)
    if known:
        raise ValueError(f"adapter {adapter} was made on the model in {name}, which is gone: put "
                         "that folder back, or a copy of it beside the run")
    return name


def base_name(model):
    """A model's name or folder; of an iteration, those of its adapter's base."""
    adapter = adapter_of(model)
    return base_of(adapter) if adapter else str(model)


def load_tokenizer(model):
    """The model's tokenizer. Raises OSError, with what to do, if there is no such model."""
    if (Path(model) / "summary.json").is_file():
        raise OSError(f"{model} is a run: name one of its iterations, as {model}/iter1")
    if (Path(model) / "seconds.json").is_file():
        raise OSError(f"{model} is an iteration, no base: eval.py export makes a model of it")
    if (Path(model) / "adapter_config.json").is_file():
        raise OSError(f"{model} holds an adapter, which is no base: merge it into its model first")
    no_name = str(model).count("/") > 1 or str(model).startswith((".", "/", "~"))  # of the hub
    if no_name and not Path(model).exists():
        raise OSError(f"model {model}: there is no such folder")
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        why = str(error).strip().splitlines()[0]
        raise OSError(f"model {model} cannot be loaded ({why}); name a model folder or a model of "
                      "the hub; for a gated one ask for access on its page, then run: hf auth "
                      "login") from None
    except Exception as error:  # damaged files of a tokenizer raise many kinds
        raise ValueError(f"model {model} cannot be loaded: its configuration or its tokenizer is "
                         f"damaged ({type(error).__name__}: {error})") from None


def check_adapter(model, folder):
    """Raise ValueError unless an adapter fits the model and is what its run, if any, wrote."""
    file = Path(folder) / "adapter_model.safetensors"
    written = read_json(Path(folder).parent / "figures.json", dict).get("adapter")
    if written and sha256(file) != written:
        raise ValueError(f"adapter {folder} is damaged: its content is not what was written; put "
                         "it back from a copy")
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: tuple(weight.shape) for name, weight in weights.items()}
    with safe_open(file, "pt") as stored:
        found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
    wrong = sorted({name for name, _ in expected.items() ^ found.items()})  # name or shape differs
    if wrong:
        raise ValueError(f"adapter {folder} does not fit the model: {len(wrong)} keys differ, the "
                         f"first is {wrong[0]}")


def fingerprint(model):
    """What tells a model, or an adapter's base, from another of the same name: a hub's commit, or
    what files hold.
    """
    model = base_name(model)
    if not Path(model).is_dir():
        return AutoConfig.from_pretrained(model)._commit_hash
    files = {file for pattern in ("*.safetensors", "*.json", "*.jinja")
             for file in Path(model).glob(pattern) if file.name != "preset.json"}
    return digest([[file.name, sha256(file)] for file in sorted(files)])
