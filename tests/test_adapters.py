"""harness/engine/adapters.py against PEFT's own layers."""
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import TEXTS, TINY, columns, tokenized, with_lora
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dpo import pair_logps, trainable
from harness.engine.adapters import is_plain, is_plain_norm, lean_layers, normed, product
from harness.engine.passes import Budget, train_without_noise
from harness.loading import load_tokenizer


def adapted(base, **settings):
    """PEFT's layer around a matrix, its adapter's second half not zero."""
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(base), LoraConfig(
        r=4, lora_alpha=8, target_modules=["0"], **settings))
    for part in model.base_model.model[0].lora_B.values():
        torch.nn.init.normal_(part.weight)
    return model


def matrix(kind):
    torch.manual_seed(1)
    plain = torch.nn.Linear(64, 32, bias="bias" in kind, dtype=torch.float64)
    if "4 bits" not in kind:
        return plain
    base = Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict({"weight": plain.weight.float()})
    return base.to("cpu")


@pytest.mark.parametrize("kind", ["plain", "with a bias", "4 bits"])
def test_output_and_gradients_are_pefts(kind):
    """In float64, to 1e-12; in 4 bits PEFT's products are of float32."""
    layer = adapted(matrix(kind)).base_model.model[0]
    dtype = torch.float32 if kind == "4 bits" else torch.float64
    for part in (*layer.lora_A.values(), *layer.lora_B.values()):
        part.to(dtype)
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    grad = torch.randn(2, 5, 32, dtype=dtype)
    assert is_plain(layer, dtype)
    ours = product(layer, x)
    theirs = layer(x)
    assert theirs.abs().max() > 1
    for a, b in zip((ours, *torch.autograd.grad(ours, weights, grad)),
                    (theirs, *torch.autograd.grad(theirs, weights, grad)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= (1e-5 if kind == "4 bits" else 1e-12) * b.abs().max()


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True},
                                      {"bias": "lora_only", "lora_bias": True}])
def test_other_adapters_are_left_to_peft(settings):
    layer = adapted(torch.nn.Linear(64, 32), **settings).base_model.model[0]
    assert not is_plain(layer, torch.float32)


@pytest.mark.parametrize("state", ["merged", "disabled", "two", "another dtype", "trains"])
def test_layers_in_another_state_are_left_to_peft(state):
    model = adapted(torch.nn.Linear(64, 32))
    layer = model.base_model.model[0]
    assert is_plain(layer, torch.float32)
    if state == "merged":
        layer.merge()
    if state == "disabled":
        layer.enable_adapters(False)
    if state == "two":
        model.add_adapter("other", LoraConfig(r=4, target_modules=["0"]))
    if state == "trains":
        layer.get_base_layer().weight.requires_grad_(True)
    assert not is_plain(layer, torch.bfloat16 if state == "another dtype" else torch.float32)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_transformers(kind, dtype):
    """Output and gradient, also under autocast; in 16 bits up to one rounding more of theirs."""
    torch.manual_seed(0)
    layer, x = kind(64).to(dtype), torch.randn(5, 64, dtype=dtype, requires_grad=True)
    torch.nn.init.normal_(layer.weight)
    assert is_plain_norm(layer, dtype)
    assert not is_plain_norm(layer, torch.float16)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = normed(layer, x), layer(x)
    slopes = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    for a, b in ((ours, theirs), slopes):
        assert a.dtype == b.dtype == dtype
        assert (a - b).abs().max() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * b.abs().max()


@pytest.mark.parametrize("layer", [GemmaRMSNorm(8), Qwen3NextRMSNormGated(8), T5LayerNorm(8),
                                   torch.nn.LayerNorm(8), torch.nn.RMSNorm(8),
                                   torch.nn.Linear(8, 8)])
def test_other_layers_are_no_plain_norms(layer):
    assert not is_plain_norm(layer, torch.float32)


@pytest.mark.parametrize("bits, norms", [(16, True), (16, False), (4, True)])
def test_a_whole_model_in_16_bits(bits, norms):
    """Its log-probabilities and gradients are PEFT's up to the rounding of 16 bits, also where
    layers are computed again. PEFT's layers are back afterwards.
    """
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_compute_dtype=torch.bfloat16)
    model = with_lora(AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.bfloat16, quantization_config=nf4 if bits == 4 else None), fresh=False)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its own way of packing has no gradient
    pairs = columns(tokenized(load_tokenizer(str(TINY)), TEXTS))

    def computed(way):
        with way:
            logps = torch.cat(pair_logps(model, *pairs))
            slope = torch.autograd.grad(logps.sum(), list(trainable(model).values()))
        return logps.detach(), torch.cat([x.flatten() for x in slope])

    with lean_layers(model, norms):
        assert norms == any("forward" in vars(module) for module in model.modules()
                            if isinstance(module, LlamaRMSNorm))
    theirs, their_slope = computed(nullcontext())
    ours, slope = computed(lean_layers(model, norms))
    assert not any("forward" in vars(module) for module in model.modules())
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    assert 0 < (slope - their_slope).norm() < 0.05 * their_slope.norm()
    Budget(model, []).recompute()
    train_without_noise(model)
    for a, b in zip(computed(lean_layers(model, norms)), (ours, slope), strict=True):
        assert torch.equal(a, b)


def test_bitsandbytes_is_for_4_bits_alone():
    """Where it cannot be imported, trainer and sampler can."""
    without = ("import importlib.util as util, sys; find = util.find_spec; "
               "util.find_spec = lambda name, *rest: "
               "None if name.startswith('bitsandbytes') else find(name, *rest); "
               "sys.modules['bitsandbytes'] = None; import dpo, sampling")
    done = subprocess.run([sys.executable, "-c", without], cwd=TINY.parent, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
