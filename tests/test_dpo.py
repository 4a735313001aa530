"""dpo.py against TRL's own trainer, hand arithmetic and plain forward passes.

The loss and its gradients are held to TRL 1.16 on random numbers (float64, 1e-12) and through a
whole model, TRL doing its own tokenizing, masking and reference.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import (
    FAMILIES,
    TEXTS,
    TINY,
    columns,
    plain_logps,
    random_model,
    tokenized,
    with_lora,
)
from datasets import Dataset
from peft import PeftModel
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)
from trl import DPOConfig, DPOTrainer

import dpo
from dpo import (
    State,
    answer_logps,
    dpo_loss,
    learning_rate,
    pair_logps,
    probe_packing,
    sft_loss,
    train_dpo,
    train_sft,
    trainable,
)
from harness.engine import passes
from harness.engine.passes import Budget, token_count
from harness.loading import load
from sampling import Chat

ONE = {"answer_ids": [1]}  # an example of one token


def messages(prompt, chosen, rejected):
    """A pair as pairs.jsonl has it."""
    return {"prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}]}


# ---- 1. TRL

def trl_trainer(model, tokenizer, folder, **settings):
    """TRL's trainer over TEXTS: (trainer, the batch its collator makes of them)."""
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[],
                     max_length=None, gradient_checkpointing=False, **settings)
    trainer = DPOTrainer(model=model, args=args, processing_class=tokenizer,
                         train_dataset=Dataset.from_list([messages(*t) for t in TEXTS]))
    return trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(len(TEXTS))])


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL's trainer around a copy of the tiny model whose adapter has an effect, with TRL's batch
    of TEXTS.
    """
    model, tokenizer = load(str(TINY))
    return trl_trainer(with_lora(model), tokenizer, tmp_path_factory.mktemp("trl"), beta=0.25)


class FakeModel:
    """Gives TRL's loss per-token log-probabilities to start from."""

    def __init__(self, logps):
        self.logps = logps

    def __call__(self, **kwargs):
        nothing = torch.zeros_like(self.logps).detach()
        return type("Output", (), {"log_probs": self.logps, "entropy": nothing,
                                   "mean_logits": nothing, "is_top1": nothing.bool()})


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_loss_and_gradients_are_trls(trl, spread, monkeypatch):
    """32 random pairs in float64, from nearly equal ones to ones far out in the sigmoid's tails;
    equal to 1e-12.
    """
    trainer, _ = trl
    monkeypatch.setattr(trainer, "precompute_ref_logps", True)
    rng = torch.Generator().manual_seed(0)
    per_token = (torch.randn(64, 7, dtype=torch.float64, generator=rng) * spread).requires_grad_()
    ref = torch.randn(64, dtype=torch.float64, generator=rng) * spread
    ones = torch.ones(64, 8, dtype=torch.long)
    batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": ones,
             "ref_chosen_logps": ref[:32], "ref_rejected_logps": ref[32:]}
    expected = trainer._compute_loss(FakeModel(per_token), batch, return_outputs=False)
    (expected_grad,) = torch.autograd.grad(expected, per_token)

    chosen, rejected = per_token.sum(1).chunk(2)
    losses, *_ = dpo_loss(chosen, rejected, ref[:32], ref[32:], beta=0.25)
    (grad,) = torch.autograd.grad(losses.mean(), per_token)
    assert torch.allclose(losses.mean(), expected, rtol=1e-12, atol=0)
    assert torch.isfinite(losses).all()
    assert torch.allclose(grad, expected_grad, rtol=1e-12, atol=1e-300) and grad.abs().max() > 1e-4


def test_our_token_ids_are_trls(trl, tiny):
    """TRL applies the chat template to the whole conversation and cuts it where the answers begin.
    """
    trainer, _ = trl
    theirs = [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
              for row in trainer.train_dataset]
    assert theirs == tokenized(tiny[1])


def test_whole_model_loss_and_lora_gradient_are_trls(trl, fresh_tiny, tiny):
    """fp32, five ragged pairs, a policy that has left its reference: the loss to 1e-5, the gradient
    to 1e-4 of its norm.
    """
    trainer, batch = trl
    model = with_lora(fresh_tiny, fresh=False).train()
    # its reference is another adapter
    theirs = {name: weight for name, weight in trainer.model.named_parameters()
              if ".default." in name}
    for name, weight in trainable(model).items():
        theirs[name].data.copy_(weight)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, batch)
    expected_grad = torch.cat([g.flatten()
                               for g in torch.autograd.grad(expected, list(theirs.values()))])

    with torch.no_grad():
        ref = pair_logps(tiny[0], *columns(tokenized(tiny[1])))
    losses, *_ = dpo_loss(*pair_logps(model, *columns(tokenized(tiny[1]))), *ref, beta=0.25)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(),
                                                               list(trainable(model).values()))])
    # and no policy that is its reference
    assert abs(losses.mean() - expected) < 1e-5 and losses.std() > 0.01
    assert F.cosine_similarity(grad, expected_grad, dim=0) > 0.999999
    assert (grad - expected_grad).norm() < 1e-4 * expected_grad.norm()


# ---- 2. hand arithmetic

def test_loss_by_hand():
    """[E5] with beta 0.1: rewards 0.1 (-10 + 12) = 0.2 and 0.1 (-11 + 8) = -0.3, margin 0.5, loss
    -log sigmoid(0.5) = log(1 + exp(-0.5)) = 0.474077; its slope in log pi(y_c) is -0.1
    sigmoid(-0.5) = -0.0377541.
    """
    policy = torch.tensor([-10.0, -11.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-12.0, -8.0], dtype=torch.float64, requires_grad=True)
    losses, chosen_rewards, rejected_rewards = dpo_loss(policy[:1], policy[1:], ref[:1], ref[1:],
                                                        beta=0.1)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx((0.2, -0.3))
    assert losses.item() == pytest.approx(0.4740770, abs=1e-7)
    losses.sum().backward()
    assert policy.grad.tolist() == pytest.approx([-0.03775407, 0.03775407], abs=1e-8)
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_loss_is_log_2_where_the_policy_is_the_reference_and_finite_far_away():
    """At a margin of -10,000 times beta 0.1 the loss is 1000, where a logarithm of a sigmoid would
    be infinite.
    """
    same = torch.tensor([-3.0, -70.0])
    assert torch.allclose(dpo_loss(same, same * 2, same, same * 2)[0], torch.tensor(2.0).log())
    zero = torch.zeros(1)
    assert dpo_loss(zero - 10000, zero, zero, zero)[0].item() == pytest.approx(1000)


# ---- 3. log-probabilities

def bigram_model(table):
    """A Llama without layers, whose next-token probabilities depend on the current token alone:
    table[current][next].
    """
    V = len(table)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=V, intermediate_size=V,
                                         num_hidden_layers=0, num_attention_heads=1,
                                         rms_norm_eps=0.0, tie_word_embeddings=False)).double()
    model.model.embed_tokens.weight.data = torch.eye(V, dtype=torch.float64)
    # the norm makes a unit vector sqrt(V) long
    model.lm_head.weight.data = torch.tensor(table, dtype=torch.float64).log().T / math.sqrt(V)
    return model


def test_logps_by_hand():
    """From 0: 0.5 0.25 0.25. From 1: 0.1 0.8 0.1. From 2: 0.2 0.3 0.5. After the prompt 0 1, p(2 1)
    = 0.1 * 0.3, p(1) = 0.8; after the prompt 2, p(0) = 0.2, p(0 0 2) = 0.2 * 0.5 * 0.25. Shifted by
    one, averaged, or with the prompt or padding (token 0) counted, each of the four is another
    number.
    """
    model = bigram_model([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    chosen, rejected = pair_logps(model, [[0, 1], [2]], [[2, 1], [0]], [[1], [0, 0, 2]])
    assert chosen.exp().tolist() == pytest.approx([0.03, 0.2])
    assert rejected.exp().tolist() == pytest.approx([0.8, 0.025])


# an answer that begins another; a long one
RAGGED = [*TEXTS, ("Why?", "Because it rains.", "Because"), ("A" * 300, "No.", "B" * 200)]


def separate(model, prompts, answers):
    """log p of each answer, every sequence a forward pass of its own, without packing, padding or
    chunks: the oracle.
    """
    apart = [(prompt, answer) for prompt, group in zip(prompts, answers) for answer in group]
    return plain_logps(model, *zip(*apart))


def kernel(query, key, value, at, begin, most, longest, dropout, causal, debug, *, scale,
           window_size_left, window_size_right):
    """torch.ops.aten._flash_attention_forward of sequences of several lengths, in a loop: the last
    query of each stands at its last key, and sees that and window_size_left before it, or all.
    """
    assert at.dtype == begin.dtype == torch.int32
    assert (at.diff().max(), begin.diff().max()) == (most, longest)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.stride(-1) == 1
    assert (dropout, causal, window_size_right) == (0.0, False, 0)
    out = []
    for q, k, v in zip(query.split(at.diff().tolist()), *(
            x.split(begin.diff().tolist()) for x in (key, value)), strict=True):
        before = torch.arange(len(k))[-len(q):, None] - torch.arange(len(k))
        seen = (before >= 0) & ((window_size_left < 0) | (before <= window_size_left))
        out.append(F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=seen, scale=scale,
            enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out), None, None, None, None


def norms_in_float64(model):
    """transformers' norms round to float32 in any model, and a gradient that is summed before them
    rounds otherwise than its parts.
    """
    def normalise(module):
        scale = module.weight + (type(module).__name__ == "GemmaRMSNorm")
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return lambda x: scale * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = normalise(module)
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("on_a_card", [False, True])
@pytest.mark.parametrize("logit_rows", [256, 5])
@pytest.mark.parametrize("name", [*FAMILIES, "mistral with windows"])
def test_packed_pairs_are_separate_sequences(tiny, name, dtype, tolerance, logit_rows, on_a_card,
                                             monkeypatch):
    """Seven ragged pairs in one row: log-probabilities and LoRA gradients, relative to the largest;
    one sequence that saw another's token would be off by more than 0.01.
    """
    monkeypatch.setattr(dpo, "LOGIT_ROWS", logit_rows)
    if on_a_card:
        monkeypatch.setattr(dpo, "has_kernel", lambda query: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    config_class, settings = {**FAMILIES, "mistral with windows": (
        MistralConfig, {"sliding_window": 7})}[name]
    model, plain = (with_lora(random_model(config_class, tiny[1], dtype=dtype, **settings),
                              fresh=False) for _ in range(2))
    if dtype == torch.float64:
        model, plain = norms_in_float64(model), norms_in_float64(plain)
    prompts, chosen, rejected = columns(tokenized(tiny[1], RAGGED))
    rejected[3] = chosen[3][:2]
    ours, theirs = torch.stack(pair_logps(model, prompts, chosen, rejected),
                               1).flatten(), separate(plain, prompts, zip(chosen, rejected))
    assert ours.shape == (14,) and (ours - theirs).abs().max() < tolerance * theirs.abs().max()
    assert theirs.abs().min() > 1
    # so that no answer's gradient stands in for another's
    weighed = torch.linspace(-1, 2, 14, dtype=torch.float64)
    ours, theirs = (torch.cat([g.flatten()
                               for g in torch.autograd.grad((weighed * logps).sum(),
                                                            list(trainable(m).values()))])
                    for logps, m in ((ours, model), (theirs, plain)))
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max() and theirs.abs().max() > 1


def test_packing_by_hand():
    """Prompt 7 8 with answers 1 2 3 and 4; prompt 9 with answer 5 6. The first token of each answer
    comes from its prompt's last.
    """
    ids, positions, sources, targets, owners = dpo.pack([[7, 8], [9]], [[[1, 2, 3], [4]], [[5, 6]]])
    assert ids == [7, 8, 1, 2, 3, 4, 9, 5, 6] and positions == [0, 1, 2, 3, 4, 2, 0, 1, 2]
    assert (sources, targets, owners) == ([1, 2, 3, 1, 6, 7], [1, 2, 3, 4, 5, 6],
                                          [0, 0, 0, 1, 2, 2])


def test_no_answer_sees_another_and_positions_restart(tiny):
    """Any number of answers to a prompt, in any order, beside any others: the same numbers. Other
    tokens in one answer change that one only.
    """
    model = random_model(LlamaConfig, tiny[1], dtype=torch.float64)
    prompt, *answers = [[3, 4, 5], [7, 8, 9, 10], [11], [12, 13]]
    one = answer_logps(model, [prompt], [answers])
    assert torch.allclose(answer_logps(model, [[9], prompt, [8, 8]],
                                       [[], answers[::-1], [[1, 2]]])[:3], one.flip(0), rtol=0,
                          atol=1e-12)
    assert torch.allclose(answer_logps(model, [prompt] * 3, [[answer] for answer in answers]), one,
                          rtol=0, atol=1e-12)
    other = answer_logps(model, [prompt], [[answers[0], [14], answers[2]]])
    assert ((other - one).abs() > 0.01).tolist() == [False, True, False]


def test_sums_of_long_answers_are_exact(tiny):
    """A thousand tokens at about -7: in float32, one after the other, the sum would be off by some
    thousandths, and the loss with it.
    """
    generator = torch.Generator().manual_seed(0)
    prompt, answer = [[5, 6, 7]], [[torch.randint(100, 900, (1000,), generator=generator).tolist()]]
    model = random_model(LlamaConfig, tiny[1], max_position_embeddings=2048, initializer_range=0.02)
    with torch.no_grad():
        single = answer_logps(model, prompt, answer)
        double = answer_logps(model.double(), prompt, answer)
    assert single.dtype == torch.float64 and double.item() < -6000
    assert abs(single - double).item() < 1e-4


def test_the_model_attends_as_before_afterwards(tiny):
    """A model that attended by sdpa still does, bit for bit and with padding: the function that
    packing left behind is sdpa without a layout.
    """
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    model = random_model(LlamaConfig, tiny[1])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        pair_logps(model, [[1, 2]], [[3]], [[4]])
        assert model.config._attn_implementation == "packed_answers"
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_gradient_checkpointing_computes_layers_again_in_the_same_way(tiny):
    """The backward pass comes after pair_logps has returned, and must attend by the layout as well.
    """
    model = with_lora(random_model(LlamaConfig, tiny[1], dtype=torch.float64), fresh=False).train()
    weights, gradients, calls = list(trainable(model).values()), [], []
    assert probe_packing(model.get_base_model())  # which counts no calls
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            Budget(model, []).recompute()
        chosen, rejected = pair_logps(model, *columns(tokenized(tiny[1], RAGGED)))
        gradients.append(torch.cat([g.flatten()
                                    for g in torch.autograd.grad((chosen - 2 * rejected).sum(),
                                                                 weights)]))
    assert len(calls) == 3 and torch.allclose(*gradients, rtol=1e-12, atol=1e-12)
    assert gradients[0].abs().max() > 1


def test_a_head_that_trains_gets_its_gradient(tiny, monkeypatch):
    """FrozenHead has none for it, and is not asked: full fine-tuning with a copy of this file."""
    monkeypatch.setattr(dpo, "LOGIT_ROWS", 5)
    model = random_model(LlamaConfig, tiny[1], dtype=torch.float64).requires_grad_(True)
    prompts, chosen, _ = columns(tokenized(tiny[1]))
    ours = torch.autograd.grad(answer_logps(model, prompts, [[y] for y in chosen]).sum(),
                               list(model.parameters()))
    plain = torch.autograd.grad(separate(model, prompts, [[y] for y in chosen]).sum(),
                                list(model.parameters()))
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9) and b.abs().max() > 1e-6


@pytest.mark.parametrize("prompts, answers", [([[]], [[[1]]]), ([[1]], [[[]]]),
                                              ([[1], [2]], [[[1]]]), ([], []), ([[1]], [[]]),
                                              ([[1]], [[[-1]]]), ([[10**6]], [[[1]]])])
def test_nothing_to_predict_or_to_predict_from_is_refused(tiny, prompts, answers):
    """And so are token ids that the model does not have, which CUDA would answer with an assertion
    that ends the process.
    """
    with pytest.raises(ValueError, match="prompt_ids and answers must"):
        answer_logps(tiny[0], prompts, answers)


def test_lists_of_other_lengths_are_refused(tiny):
    with pytest.raises(ValueError,
                       match="prompt_ids, chosen_ids and rejected_ids must have the same length"):
        pair_logps(tiny[0], [[1], [2]], [[3], [4]], [[5]])


@pytest.mark.parametrize("settings", [{"epochs": 0, "batch_size": 1},
                                      {"epochs": 1, "batch_size": 0},
                                      {"epochs": 1, "batch_size": 1}])
def test_training_on_nothing_is_refused(tiny, fresh_tiny, settings):
    examples = tokenized(tiny[1]) if 0 in settings.values() else []
    with pytest.raises(ValueError,
                       match="examples must not be empty, and epochs and batch_size must be at "
                             "least 1"):
        list(train_dpo(with_lora(fresh_tiny), examples, beta=0.1, lr=1e-3, **settings))


def test_a_model_without_an_adapter_is_refused(fresh_tiny, tiny):
    with pytest.raises(ValueError, match="no LoRA adapter"):
        list(train_dpo(fresh_tiny, tokenized(tiny[1]), beta=0.1, epochs=1, batch_size=5, lr=1e-3))


def test_dropout_is_off_in_training(tiny):
    """GPT-2 has some by default; with it the policy would differ from its reference before the
    first step.
    """
    model = with_lora(random_model(lambda **_: GPT2Config(vocab_size=len(tiny[1]), n_embd=32,
                                                          n_layer=2, n_head=2, n_positions=256),
                                   tiny[1]))
    first, *_ = train_dpo(model, tokenized(tiny[1]), beta=0.1, epochs=1, batch_size=5, lr=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_is_close_to_float64(tiny, checkpointing):
    """What a GPU trains in: base in bfloat16, adapters in float32. Each adapter would keep a
    float32 copy of its input; none is kept.
    """
    gradients, kept = [], []
    for dtype in (torch.float64, torch.bfloat16):
        model = with_lora(random_model(LlamaConfig, tiny[1], initializer_range=0.1),
                          fresh=False).train()
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(torch.bfloat16).to(dtype if "lora_" not in name
                                                            or dtype == torch.float64
                                                            else torch.float32)
        if checkpointing:
            Budget(model, []).recompute()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            chosen, rejected = pair_logps(model, *columns(tokenized(tiny[1], RAGGED)))
        gradients.append(torch.cat([g.flatten().double()
                                    for g in torch.autograd.grad((chosen - rejected).sum(),
                                                                 list(trainable(model).values()))]))
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {weight.dtype for weight in trainable(model).values()} == {expected}
        inputs = {x.untyped_storage().data_ptr() for x in kept if x.dtype == torch.float32
                  and x.shape[-1] in (64, 96) and x.numel() > 100 * 64}
        kept.clear()
    assert F.cosine_similarity(*gradients, dim=0) > 0.998 and gradients[0].norm() > 1
    # of the norms; seven adapters in two layers would add 14
    assert checkpointing or len(inputs) == 4


def test_an_encoder_is_refused_by_name(tiny):
    model = random_model(BertConfig, tiny[1])
    for _ in range(2):  # the second time as well
        with pytest.raises(ValueError, match="bert.*both directions"):
            pair_logps(model, [[1]], [[2]], [[3]])


def test_beyond_the_limit_of_a_rotation_sequences_go_alone(tiny):
    """Up to there a pair beside longer ones has the numbers that it has alone. Beyond, a longer one
    would rotate it in another way, so each has a pass of its own.
    """
    model = random_model(LlamaConfig, tiny[1], rope_parameters={"rope_type": "dynamic",
                                                                "factor": 2.0,
                                                                "rope_theta": 10000.0},
                         max_position_embeddings=32, dtype=torch.float64)
    short = ([3, 4], [5, 6], [7])
    for longer in (([1] * 20, [2] * 12, [3]), ([1] * 20, [2] * 13, [3])):
        alone, beside = (torch.stack(pair_logps(model, *zip(*rows)))[:, 0]
                         for rows in ([short], [short, longer]))
        assert torch.allclose(alone, beside, rtol=0, atol=1e-9)


def test_logps_of_another_architecture(tiny):
    """GPT-2 keeps its layers under another name and its positions in a table."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                        initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    model = random_model(lambda **_: config, tiny[1], dtype=torch.float64)
    prompts, answers = [[3, 4, 5], [6]], [[7], [8, 9, 10]]
    with torch.no_grad():
        expected = separate(model, prompts, [[y] for y in answers])
        assert torch.allclose(answer_logps(model, prompts, [[y] for y in answers]), expected,
                              rtol=0, atol=1e-9)


# ---- 4. supervised fine-tuning

def test_sft_loss_by_hand():
    """Log-probability -6 over three tokens is 2 a token; -5 over two is 2.5."""
    assert sft_loss(torch.tensor([-6.0, -5.0]), [[7, 8, 9], [7, 8]]).tolist() == [2.0, 2.5]


def test_sft_loss_and_gradient_are_those_of_transformers(tiny):
    """transformers' loss with the prompt's labels at -100 is the oracle; trained on the prompt too,
    the gradient is another one.
    """
    model = with_lora(random_model(LlamaConfig, tiny[1], dtype=torch.float64), fresh=False)
    weights = list(trainable(model).values())
    prompts, answers, _ = columns(tokenized(tiny[1]))

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    def theirs(labels_of_prompts):
        return sum(model(input_ids=torch.tensor([p + y]), labels=torch.tensor([labels + y])).loss
                   for p, y, labels in zip(prompts, answers, labels_of_prompts))

    losses = sft_loss(answer_logps(model, prompts, [[y] for y in answers]), answers)
    expected = theirs([[-100] * len(p) for p in prompts])
    grad = gradient(losses.sum())
    assert abs(losses.sum() - expected) < 1e-6 * expected  # it rounds to fp32 within
    assert (grad - gradient(expected)).norm() < 1e-5 * grad.norm()
    assert (grad - gradient(theirs(prompts))).norm() > 0.1 * grad.norm()


# ---- adapters

def test_a_fresh_adapter_changes_nothing_and_leaves_the_head_alone(tiny, fresh_tiny):
    """Bit for bit the base's logits; seven linear layers in each block, and no other."""
    model = with_lora(fresh_tiny)
    ids = torch.tensor([Chat(tiny[1]).prompt("Why?")])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny[0](input_ids=ids).logits)
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in trainable(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name for name, weight in model.named_parameters()
            if weight.requires_grad} == trainable(model).keys()


def test_gradients_in_four_bits_are_those_of_the_dequantized_weights(tiny):
    """After sampling or measuring, too: there bitsandbytes packs weights anew on some processors,
    and gradients no longer pass through them.
    """
    rounded, plain = load(str(TINY), bits=4)[0], load(str(TINY))[0]
    for name, module in rounded.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight
    gradients = []
    for model in (rounded, plain):
        model = with_lora(model, fresh=False).eval()
        with torch.no_grad():
            pair_logps(model, *columns(tokenized(tiny[1])))
        loss = dpo_loss(*pair_logps(model.train(), *columns(tokenized(tiny[1]))), torch.zeros(5),
                        torch.zeros(5))[0].sum()
        slopes = torch.autograd.grad(loss, list(trainable(model).values()))
        gradients.append(torch.cat([slope.flatten() for slope in slopes]))
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


def bits_of_base(model):
    """Every weight, buffer and quantisation state outside the adapter, as bytes."""
    return {name: tensor.detach().clone().contiguous().view(torch.uint8) if tensor.dim()
            else tensor.clone()
            for name, tensor in model.state_dict().items() if "lora_" not in name}


def test_dpo_in_four_bits_learns_and_comes_back(tiny, tmp_path):
    """NF4 base, LoRA on top: the loss on the pairs falls far below log 2, the base keeps every bit,
    the adapter loads here and in PEFT.
    """
    model = with_lora(load(str(TINY), bits=4)[0], rank=4)
    base = bits_of_base(model)
    assert any(name.endswith("quant_state.bitsandbytes__nf4") for name in base)
    records = list(train_dpo(model, tokenized(tiny[1]), beta=0.1, epochs=8, batch_size=5, lr=5e-3))
    model.save_pretrained(tmp_path / "adapter")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.3
    after = bits_of_base(model)
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)

    again = load(str(TINY), adapter=tmp_path / "adapter", bits=4)[0]
    in_peft = PeftModel.from_pretrained(load(str(TINY), bits=4)[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = torch.cat(pair_logps(model, *columns(tokenized(tiny[1]))))
        for other in (again, in_peft):
            assert torch.equal(torch.cat(pair_logps(other, *columns(tokenized(tiny[1])))), expected)
        untrained = torch.cat(pair_logps(load(str(TINY), bits=4)[0], *columns(tokenized(tiny[1]))))
    assert (untrained - expected).abs().max() > 1


# ---- 6. the training loop

def test_passes_keep_order_and_limit(tiny, monkeypatch):
    sizes = [3, 3, 5, 1, 9, 2]
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 7)
    runs = Budget(tiny[0], []).passes(len, [{"answer_ids": [0] * size} for size in sizes])
    assert [([len(example["answer_ids"]) for example in run], count)
            for run, count in runs] == [([3, 3], 2), ([5, 1], 2), ([9], 1), ([2], 1)]


def out_of_memory(monkeypatch, *when):
    """Let passes fail as CUDA does, late in the backward pass, on calls of pair_logps number
    `when`: returns the calls' sizes, in pairs.
    """
    calls = []

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def failing(model, prompts, chosen, rejected):
        calls.append(len(prompts))
        if len(calls) not in when:
            return pair_logps(model, prompts, chosen, rejected)
        layer = model.get_base_model().model.layers[0]
        first = layer.register_forward_hook(lambda module, args, out: out.register_hook(fail)
                                            and None)
        logps = pair_logps(model, prompts, chosen, rejected)
        first.remove()
        return logps
    monkeypatch.setattr(dpo, "pair_logps", failing)
    return calls


def test_a_step_that_ran_out_of_memory_has_the_same_gradient(tiny, monkeypatch, capsys):
    """Five pairs at once, then fewer: twice the pass is halved, once in the midst of the batch.
    float64, and the log is the same too.
    """
    gradients, logs = recorded_gradients(monkeypatch), []
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 300)
    for number, when in enumerate([(), (2, 4)]):  # the first call is the reference's
        calls = out_of_memory(monkeypatch, *when)
        model = with_lora(random_model(LlamaConfig, tiny[1], dtype=torch.float64), fresh=False)
        logs.append(list(train_dpo(model, tokenized(tiny[1]), beta=0.1, epochs=1, batch_size=5,
                                   lr=1e-3)))
        assert calls == [[5, 5], [5, 5, 2, 2, 1, 1, 1]][number] or print(calls)
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[0].norm()
    told = capsys.readouterr().err
    assert told.count("out of memory: training goes on with passes half as large") == 2
    whole, halved = (log[0] for log in logs)
    assert whole.keys() == halved.keys()
    assert halved["loss"] == pytest.approx(whole["loss"], rel=1e-12)


def test_when_one_pair_is_too_much_layers_are_computed_again_and_then_it_is_refused(
        fresh_tiny, tiny, monkeypatch, capsys):
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", 1)
    model = with_lora(fresh_tiny)
    examples = tokenized(tiny[1], TEXTS[:1])
    out_of_memory(monkeypatch, 2)
    records = list(train_dpo(model, examples, beta=0.1, epochs=1, batch_size=1, lr=1e-3))
    assert "gradient checkpointing" in capsys.readouterr().err and len(records) == 2
    examples = tokenized(tiny[1], TEXTS[:1])
    out_of_memory(monkeypatch, 2, 3)
    with pytest.raises(ValueError,
                       match=f"an example of {token_count(examples[0])} tokens does not fit"):
        list(train_dpo(model, examples, beta=0.1, epochs=1, batch_size=1, lr=1e-3))


@pytest.mark.parametrize("says", ["CUDA error: out of memory",
                                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
                                  "`cublasCreate(handle)`"])
def test_libraries_report_a_lack_of_memory_in_their_own_ways(tiny, says):
    sizes = []

    def work(part):
        sizes.append(len(part))
        if len(sizes) == 1:
            raise RuntimeError(says)
        return part
    assert sum(len(part)
               for part, _ in Budget(tiny[0], []).passes(work, [{"answer_ids": [1]}] * 4)) == 4
    assert sizes == [4, 2, 2]


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny):
    def work(part):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        list(Budget(tiny[0], []).passes(work, [{"answer_ids": [1]}] * 2))


class OnCuda:
    """As much of a model on CUDA as a Budget asks for."""
    device, recomputed = torch.device("cuda"), False

    def gradient_checkpointing_enable(self, **settings):
        self.recomputed = True

    def gradient_checkpointing_disable(self):
        self.recomputed = False


@pytest.mark.parametrize("free, tokens, recomputed", [(10**9, 800, False), (10**12, 16384, False),
                                                      (4 * 10**8, 16384, True)])
def test_the_budget_comes_from_free_memory(monkeypatch, free, tokens, recomputed):
    """A megabyte a token, and 80 % of what is free: where the largest example does not fit, layers
    are computed again.
    """
    monkeypatch.setattr(passes, "free_memory", lambda: free)
    monkeypatch.setattr(passes, "activation_bytes", lambda model: 10**6)
    model = OnCuda()
    budget = Budget(model, [{"answer_ids": [0] * 200}, {"answer_ids": [0] * 500}])
    assert (budget.tokens, model.recomputed) == (tokens, recomputed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_token_keeps_is_estimated_well(tiny, name, dtype):
    """Against what autograd saves, every storage counted once: not less, for that would run out of
    memory, and at most twice as much.
    """
    config_class, settings = FAMILIES[name]
    # as wide for its width as Llama-3's
    model = with_lora(random_model(config_class, tiny[1], dtype=dtype, intermediate_size=224,
                                   **settings))
    own, saved = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = pair_logps(model, [[5] * 300], [[6] * 50], [[7] * 50])
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / 400
    assert logps[0].requires_grad and 1 < passes.activation_bytes(model) / measured < 2


def recorded_gradients(monkeypatch):
    """A list that receives a copy of every gradient before it is clipped."""
    gradients, clip = [], torch.nn.utils.clip_grad_norm_

    def record(weights, limit):
        weights = list(weights)
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]).clone())
        return clip(weights, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    return gradients


@pytest.mark.parametrize("limit", [1, 60, 10**6])
def test_the_gradient_does_not_depend_on_the_passes(tiny, monkeypatch, limit):
    """One example a pass, some, or all five at once, of different lengths: always the gradient of
    the batch's mean loss, in float64.
    """
    monkeypatch.setitem(passes.PASS_TOKENS, "cpu", limit)
    gradients = recorded_gradients(monkeypatch)
    model = with_lora(random_model(LlamaConfig, tiny[1], dtype=torch.float64), fresh=False)
    prompts, answers, _ = columns(tokenized(tiny[1]))
    mean = sft_loss(answer_logps(model, prompts, [[y] for y in answers]), answers).mean()
    expected = torch.cat([g.flatten()
                          for g in torch.autograd.grad(mean, list(trainable(model).values()))])
    examples = [{"prompt_ids": p, "answer_ids": y} for p, y in zip(prompts, answers)]
    first, *_ = train_sft(model, examples, epochs=1, batch_size=5, lr=1e-3)
    assert (gradients[0] - expected).norm() < 1e-10 * expected.norm()
    assert first["loss"] == pytest.approx(mean.item(), rel=1e-12)
    assert first["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-6)


def test_learning_rate_by_hand():
    """20 steps: 2 of warm-up, then a cosine over 18. Step 11 is halfway down; the last has 0.5 (1 +
    cos(17 pi / 18)) = 0.0076 left.
    """
    rates = [learning_rate(step, 20, 2.0) for step in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0] and rates[11] == pytest.approx(1.0)
    assert rates[19] == pytest.approx(2 * 0.0075961, abs=1e-6)
    assert all(a > b for a, b in zip(rates[2:], rates[3:]))
    assert [learning_rate(0, 1, 2.0), learning_rate(0, 2, 2.0),
            learning_rate(1, 2, 2.0)] == [2.0, 2.0, 2.0]


def test_the_logged_learning_rate_is_the_one_that_steps(fresh_tiny, tiny):
    """Adam's first step moves each weight by the learning rate, whatever its gradient: B, which was
    zero, is now that or minus that.
    """
    model = with_lora(fresh_tiny)
    step, _ = train_dpo(model, tokenized(tiny[1]), beta=0.1, epochs=1, batch_size=5, lr=3e-3)
    assert step["lr"] == 3e-3
    moved = torch.cat([weight.detach().flatten().abs() for name, weight in trainable(model).items()
                       if "lora_B" in name])
    assert moved.median() == pytest.approx(3e-3, rel=1e-3) and moved.max() < 3.01e-3


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_to_norm_one(fresh_tiny, monkeypatch, scale):
    """What the optimizer sees: a small gradient as it is, a large one cut to norm 1; the log has
    the norm before.
    """
    seen, step = [], torch.optim.AdamW.step

    def record(optimizer, *args):
        seen.append(torch.cat([w.grad.flatten()
                               for w in optimizer.param_groups[0]["params"]]).norm().item())
        return step(optimizer, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    model = with_lora(fresh_tiny)
    weights = list(trainable(model).values())

    def compute(part):
        return scale * sum(weight.sum() for weight in weights).expand(len(part)), {}
    record, _ = dpo.train(model, [ONE] * 2, [], compute, epochs=1, batch_size=2, lr=1e-3)
    norm = scale * math.sqrt(sum(weight.numel() for weight in weights))
    assert seen == [pytest.approx(min(1, norm), rel=1e-4)]
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def scripted(model, held_out_losses):
    """(compute, snapshots): training moves every weight, held-out losses are those given, and each
    epoch's weights are kept.
    """
    weights, left, snapshots = trainable(model), list(held_out_losses), []

    def compute(part):
        if model.training:
            return sum(weight.sum() for weight in weights.values()).expand(len(part)), {}
        snapshots.append({name: weight.detach().clone() for name, weight in weights.items()})
        return torch.full((len(part),), left.pop(0)), {}
    return compute, snapshots


@pytest.mark.parametrize("held_out_losses, best", [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0),
                                                   ([3.0, 2.0, 1.0], 2)])
def test_the_epoch_that_is_best_on_held_out_examples_is_kept(fresh_tiny, held_out_losses, best):
    """In the model and in the state; the epochs' weights all differ."""
    model = with_lora(fresh_tiny)
    compute, snapshots = scripted(model, held_out_losses)
    state = State(model)
    records = list(dpo.train(model, [ONE] * 4, [ONE] * 3, compute, epochs=3, batch_size=2, lr=1e-2,
                             state=state))
    assert state.best == {"epoch": best + 1, "held_out_loss": held_out_losses[best]}
    assert not any(torch.equal(snapshots[best][name], snapshots[best - 1][name])
                   for name in snapshots[0])
    assert all(torch.equal(weight, snapshots[best][name])
               for name, weight in trainable(model).items())
    assert [record["held_out_loss"] for record in records
            if "step" not in record] == held_out_losses
    assert not model.training


def test_without_held_out_examples_the_last_epoch_is_kept(fresh_tiny):
    model = with_lora(fresh_tiny)
    compute, _ = scripted(model, [])
    *_, last = dpo.train(model, [ONE] * 4, [], compute, epochs=3, batch_size=2, lr=1e-2)
    assert last == {"epoch": 3}
    moved = [weight.abs().max().item() for name, weight in trainable(model).items()
             if "lora_B" in name]
    rates = sum(learning_rate(step, 6, 1e-2) for step in range(6))
    # a constant gradient makes each of Adam's steps as long as its rate
    assert moved == pytest.approx([rates] * len(moved), rel=1e-3)


def test_every_epoch_sees_every_example_once_in_another_order(fresh_tiny):
    model = with_lora(fresh_tiny)
    seen, weights = [], list(trainable(model).values())

    def compute(part):
        seen.extend(example["name"] for example in part)
        return sum(weight.sum() for weight in weights).expand(len(part)), {}
    examples = [{**ONE, "name": name} for name in range(20)]
    records = list(dpo.train(model, examples, [], compute, epochs=2, batch_size=6, lr=1e-3))
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert len({tuple(seen[:20]), tuple(seen[20:]), tuple(range(20))}) == 3
    assert [record["step"] for record in records if "step" in record] == list(range(1, 9))


# ---- what is not a number

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training(fresh_tiny, bad):
    """At the third step, before the weights are touched; the message names the step and a remedy.
    """
    model = with_lora(fresh_tiny)
    weights, calls = list(trainable(model).values()), []

    def compute(part):
        calls.append(1)
        losses = sum(weight.sum() for weight in weights).expand(len(part))
        return losses * bad if len(calls) == 3 else losses, {}
    records = []
    with pytest.raises(FloatingPointError, match="loss at step 3 .*--lr"):
        records.extend(dpo.train(model, [ONE] * 8, [], compute, epochs=1, batch_size=2, lr=1e-3))
    assert all(torch.isfinite(weight).all() for weight in weights) and len(records) == 2


def test_a_gradient_that_is_not_finite_stops_training(fresh_tiny):
    """The square root has a finite value and an infinite slope at zero."""
    model = with_lora(fresh_tiny)
    weights = [weight for name, weight in trainable(model).items() if "lora_B" in name]  # zeros

    def compute(part):
        return sum(weight.sqrt().sum() for weight in weights).expand(len(part)), {}
    with pytest.raises(FloatingPointError, match="gradient at step 1 .*--lr"):
        list(dpo.train(model, [ONE] * 2, [], compute, epochs=1, batch_size=2, lr=1e-3))
    assert all((weight == 0).all() for weight in weights)


def test_a_held_out_loss_that_is_not_finite_stops_training(fresh_tiny):
    """Otherwise the epoch whose last step broke the model could be kept as the best one."""
    model = with_lora(fresh_tiny)
    compute, _ = scripted(model, [float("nan")])
    with pytest.raises(FloatingPointError, match="--lr"):
        list(dpo.train(model, [ONE] * 2, [ONE], compute, epochs=1, batch_size=2, lr=1e-3))


def test_dpo_starts_from_its_reference(fresh_tiny, tiny):
    """Also with an adapter that has an effect: the first loss is log 2 and the first margin 0,
    since the reference is the model as it is.
    """
    model = with_lora(fresh_tiny, fresh=False)
    first, *_ = train_dpo(model, tokenized(tiny[1]), beta=0.1, epochs=1, batch_size=5, lr=1e-3)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert np.isfinite(first["chosen_logp"])
    assert first["tokens"] == sum(len(p) + len(c) + len(r)
                                  for p, c, r in zip(*columns(tokenized(tiny[1]))))
