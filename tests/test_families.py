"""Every family of benchmarks/families.py against transformers' own generate and plain passes.

Greedy samples must be generate's token for token, log-probabilities and gradients those of a plain
forward pass of one sequence, whichever way a model goes. Windows of 6 tokens lie inside prompts,
shared beginnings and answers.
"""
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import greedy_ids, plain_logps, random_model, with_lora
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma3Config,
    LlamaConfig,
    PhiConfig,
    RwkvConfig,
    T5Config,
)

import dpo
import sampling
from benchmarks.families import COMMON, FAMILIES, VOCABULARY, random_family, row
from dpo import answer_logps, pair_logps, probe_packing, trainable
from harness.engine import passes
from harness.loading import load
from sampling import sample_tokens

BEGINNING = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
PROMPTS = [[5, 6, 7], [*BEGINNING, 20], [*BEGINNING, 21, 22, 23], [*BEGINNING, 24, 25], [40],
           [9, 8, 7, 6, 5, 4, 3, 10, 11, 12, 13, 14, 15, 16, 17]]
CHOSEN = [[3, *ids[::-1]] for ids in PROMPTS]
REJECTED = [[ids[0], 3, 9, 4] for ids in PROMPTS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_sampled_and_trained_as_transformers_does(name):
    """By rows with and without shared beginnings, all at once and a few at a time."""
    model = random_family(name)
    expected = [greedy_ids(model, ids, 10) for ids in PROMPTS]
    assert len({tuple(ids) for ids in expected}) >= 4, "the prompts must be told apart"
    for n, capacity in ((1, None), (2, None), (2, 60)):
        got = sample_tokens(model, PROMPTS, n, stops={2}, max_new_tokens=10, temperature=0,
                            capacity=capacity)
        assert got == [[ids] * n for ids in expected]

    model = with_lora(random_family(name), fresh=False)
    expected, told = [greedy_ids(model, ids, 6) for ids in PROMPTS], {}
    assert sample_tokens(model, PROMPTS, stops={2}, max_new_tokens=6, temperature=0,
                         on_token=lambda i, number, ids: told.setdefault(i, []).append([*ids])
                         ) == [[ids] for ids in expected]
    assert told == {i: [ids[:end] for end in range(1, len(ids) + 1)]
                    for i, ids in enumerate(expected)}
    weights = list(trainable(model).values())
    plain = [plain_logps(model, PROMPTS, answers) for answers in (CHOSEN, REJECTED)]
    ours = pair_logps(model, PROMPTS, CHOSEN, REJECTED)
    slopes = []
    for chosen, rejected in (plain, ours):
        slope = torch.autograd.grad((chosen - 2 * rejected).sum(), weights, materialize_grads=True)
        slopes.append(torch.cat([part.flatten().double() for part in slope]))
    assert torch.allclose(torch.stack(plain), torch.stack(ours), rtol=0, atol=1e-4)
    assert (slopes[0] - slopes[1]).norm() < 1e-3 * slopes[0].norm() > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_families(name, capsys):
    """docs/models.md has the row that the command gives; what is slower is said, once."""
    expected, said = row(name)
    table = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert expected in table.splitlines()
    assert [word in said for word in ("sampled through its own cache", "one sequence a pass")] \
        == [way == "plain" for way in re.findall("fast|plain", expected.split("`")[-1])]


def test_draws_are_the_same_either_way(monkeypatch):
    """The same uniform numbers, and the same nucleus: only the way to the logits differs."""
    model = random_family("llama", torch.float64)
    settings = {"stops": set(range(0, 90, 9)), "max_new_tokens": 12, "seed": "one"}
    fast = sample_tokens(model, PROMPTS, 5, **settings)
    monkeypatch.setitem(sampling.token_bytes, model, None)
    assert sample_tokens(model, PROMPTS, 5, **settings) == fast
    assert sample_tokens(model, PROMPTS, 5, capacity=40, **settings) == fast  # two at a time
    assert len({len(ids) for ids in fast[0]}) > 1


def test_a_long_prompt_does_not_rotate_a_short_one(tiny):
    """Where the rotation of a pass depends on its longest sequence, each length has its own."""
    model = random_model(LlamaConfig, tiny[1], dtype=torch.float64, rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}, head_dim=16)
    settings = {"stops": {2}, "max_new_tokens": 12, "keys": ["short"]}
    alone = sample_tokens(model, [[5, 6, 7]], **settings)
    beside = sample_tokens(model, [[5, 6, 7], [9] * 34], **settings | {"keys": ["short", "long"]})
    assert beside[0] == alone[0]


def test_a_model_that_ignores_positions_is_seen_through(tiny, monkeypatch, capsys):
    model = random_model(LlamaConfig, tiny[1])
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, position_ids=None, **kwargs:
                        forward(*args, **kwargs))
    assert sampling.probe_sharing(model) is None and not probe_packing(model)
    assert capsys.readouterr().err.count("gives other logits so than by a plain pass") == 2


def test_rounding_that_moves_a_few_logits_far_is_no_other_attention(tiny, monkeypatch, capsys):
    """As of SmolLM2 in bfloat16: one of the tries must agree, and a wrong way agrees in none."""
    model, tries = random_model(LlamaConfig, tiny[1]), []
    rows = sampling.try_rows

    def moved(*arguments):
        tries.append(arguments)
        batch, logits = rows(*arguments)
        return batch, logits * (1.1 if len(tries) < agrees else 1)

    monkeypatch.setattr(sampling, "try_rows", moved)
    for agrees in (3, 9):
        tries.clear()
        sampling.token_bytes.pop(model, None)
        assert bool(sampling.probe_sharing(model)) == (agrees == 3)
        assert len(tries) == min(agrees, 5)
    assert "gives other logits so than by a plain pass" in capsys.readouterr().err


def test_what_sees_pictures_is_not_adapted():
    """A model that takes pictures as well is its text model to us."""
    text = {**COMMON, **FAMILIES["gemma3_text"][1]}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=sight))
    model.eval().requires_grad_(False)
    expected = [greedy_ids(model, ids, 8) for ids in PROMPTS]
    got = sample_tokens(model, PROMPTS, stops={2}, max_new_tokens=8, temperature=0)
    assert got == [[ids] for ids in expected]
    model = with_lora(model).train()
    chosen, _ = pair_logps(model, PROMPTS, CHOSEN, REJECTED)
    assert torch.allclose(chosen, plain_logps(model, PROMPTS, CHOSEN), rtol=0, atol=1e-3)
    assert not any("vision" in name for name in trainable(model))


def test_a_model_that_keeps_the_layout_from_its_layers_trains_plainly(tiny, monkeypatch, capsys):
    """In a packed row its answers would see each other, and nothing else would show it."""
    model = random_model(LlamaConfig, tiny[1], dtype=torch.float64)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward",
                        lambda *args, layout=None, **kwargs: forward(*args, **kwargs))
    for said in (1, 0):
        logps = answer_logps(model, [[1, 5]], [[[2, 3], [3, 6, 9]]])
        expected = plain_logps(model, [[1, 5]] * 2, [[2, 3], [3, 6, 9]])
        assert torch.allclose(logps, expected, rtol=0, atol=1e-9)
        assert capsys.readouterr().err.count("llama does not hand a row's layout on") == said


def test_a_window_that_only_the_models_mask_knows_is_not_missed(capsys):
    """Phi-3.5-MoE's layers do not pass their window on; Doge masks by a rule of its own."""
    for name, settings in (("phimoe", {"sliding_window": 6}), ("doge", {"keep_window_size": 2})):
        model = random_family("phimoe", **settings) if name == "phimoe" else doge(**settings)
        expected = [greedy_ids(model, ids, 8) for ids in PROMPTS]
        got = sample_tokens(model, PROMPTS, stops={2}, max_new_tokens=8, temperature=0)
        assert got == [[ids] for ids in expected]
        assert "sampled through its own cache" in capsys.readouterr().err
    model = random_family("phimoe", sliding_window=6)
    logps = answer_logps(model, PROMPTS, [[ids] for ids in CHOSEN])
    assert torch.allclose(logps, plain_logps(model, PROMPTS, CHOSEN), rtol=0, atol=1e-4)


def doge(**settings):
    torch.manual_seed(0)
    config = DogeConfig(**{**COMMON, **settings})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_windows_with_gradient_checkpointing_and_in_bfloat16(dtype, tolerance):
    model = with_lora(random_family("mistral", dtype), fresh=False).train()
    weights = list(trainable(model).values())
    plain = plain_logps(model, PROMPTS, CHOSEN)
    slopes = [torch.autograd.grad(plain.sum(), weights)]
    for recomputing in (False, True):
        if recomputing:
            passes.Budget(model, []).recompute()
        logps = answer_logps(model, PROMPTS, [[ids] for ids in CHOSEN])
        assert (logps - plain).norm() < tolerance * plain.norm()
        slopes.append(torch.autograd.grad(logps.sum(), weights))
    first, *others = (torch.cat([part.flatten().double() for part in slope]) for slope in slopes)
    assert all((first - other).norm() < 4 * tolerance * first.norm() for other in others)


def test_attention_that_was_changed_meanwhile_is_changed_back(tiny, monkeypatch):
    """By the user, after a first call; and by the probe, if that does not come to its end."""
    model = random_model(LlamaConfig, tiny[1])
    before = model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "try_packing", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer_logps(model, [[1, 5]], [[[2, 3]]])
    assert model.config._attn_implementation == before
    first = answer_logps(model, [[1, 5]], [[[2, 3], [3, 6, 9]]])
    model.set_attn_implementation("sdpa")
    assert torch.equal(answer_logps(model, [[1, 5]], [[[2, 3], [3, 6, 9]]]), first)


def test_a_model_that_changes_its_logits_in_another_way_trains_plainly(tiny, monkeypatch, capsys):
    """The fast way would give log-probabilities that are finite, plausible and wrong."""
    model = random_model(LlamaConfig, tiny[1])
    forward = type(model).forward

    def halved(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 2
        return out

    monkeypatch.setattr(type(model), "forward", halved)
    assert not probe_packing(model) and "gives other logits" in capsys.readouterr().err
    logps = answer_logps(model, [[1, 5]], [[[2, 3]]])
    assert torch.allclose(logps, plain_logps(model, [[1, 5]], [[2, 3]]), rtol=0, atol=1e-5)


def test_a_model_without_a_cache_is_refused_by_name(tiny):
    model = random_model(RwkvConfig, tiny[1], attention_hidden_size=64)
    with pytest.raises(ValueError, match="rwkv keeps no cache"):
        sample_tokens(model, [[1, 2]], stops={2}, max_new_tokens=3)


def test_a_model_with_an_encoder_is_refused_in_one_line(tiny, tmp_path):
    T5Config(vocab_size=VOCABULARY, d_model=32).save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5.*choose another model") as error:
        load(tmp_path)
    assert len(str(error.value)) < 300


def test_a_head_with_a_bias_and_in_bfloat16(tiny):
    """Against autograd through log_softmax. In bfloat16 both round the same logits, and the
    gradient to three digits.
    """
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
        model = random_model(PhiConfig, tiny[1], dtype=dtype)
        assert model.lm_head.bias is not None
        torch.nn.init.normal_(model.lm_head.bias)
        targets = torch.arange(6)
        hidden = torch.randn(6, model.config.hidden_size, dtype=dtype, requires_grad=True)
        logps = [way(model, hidden, targets) for way in (dpo.head_logps, dpo.token_logps)]
        ours, theirs = (torch.autograd.grad((x * targets).sum(), hidden)[0] for x in logps)
        assert torch.allclose(*logps, rtol=1e-6)
        assert ours.dtype == dtype and (ours - theirs).norm() < tolerance * theirs.norm()


NOISY = {"gemma2": {"attention_dropout": 0.2}, "falcon": {"hidden_dropout": 0.2}, "phimoe": {},
         "mixtral": {"router_jitter_noise": 0.1}, "bloom": {"hidden_dropout": 0.2},
         "llama": {"attention_dropout": 0.2}, "gpt2": {"resid_pdrop": 0.2}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_the_policy_begins_as_its_reference(name, recomputing, monkeypatch):
    """Whatever noise a model's configuration asks for in training: by its dropout modules, by its
    own call of a function, by the jitter of a router. The first loss is log 2.
    """
    if recomputing and name == "falcon":
        pytest.skip("drops out in the layer itself, which is recomputed; see train_without_noise")
    model = with_lora(random_family(name, **NOISY[name]), fresh=False)
    if recomputing:
        monkeypatch.setattr(passes.Budget, "__init__", lambda self, model, examples: (
            vars(self).update(model=model, tokens=512), self.recompute())[0])
    examples = [{"prompt_ids": ids, "chosen_ids": chosen, "rejected_ids": rejected}
                for ids, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED)]
    first = next(dpo.train_dpo(model, examples, beta=0.1, epochs=1, batch_size=6, lr=1e-9))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["chosen_reward"] == pytest.approx(0, abs=1e-4)
