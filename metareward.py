"""Meta-Rewarding (Wu et al. 2024, arXiv 2407.19594): a model answers, judges its answers, judges its judgments, and trains on both.

The reference of iteration t, and where its training starts, is M_{t-1}, the model that made iteration t's data; the result is M_t. M_0 is
the seed after a warm start on EFT judgments. One LoRA adapter on one frozen base carries through; it is never merged into the base.

Deviations from the paper: (1) LoRA on a 4-bit base instead of full fine-tuning, with ten times its learning rate; (2) the model under training
invents its own prompts instead of a 70B model; (3) EFT judgments come from the seed model, kept where they agree with human ranks; (4) the
epoch is picked by its loss on held-out pairs; (5) the Elo fit is regularised (see `elo`);
(6) the judge of every M_t is measured on M_0's held-out answers (eval_judge.jsonl), so that its figures compare.
"""
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # until `main` begins: the imports below take seconds
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # one process of several shows its bars
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait give way: ten times faster where something else runs, no slower elsewhere
import numpy as np
import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from tqdm import tqdm

import prompts as words
from dpo import add_lora, check_logits, collect, digest, rank, save_adapter, set_adapter, share, train_dpo, train_sft, world
from eval import (
    Parser,
    by_prompt,
    drifts,
    figure_rows,
    measure_actor,
    measure_judge,
    measure_meta_judge,
    measure_people,
    measure_repeats,
    numbers,
    read_jsonl,
    report,
    truth,
    write_jsonl,
    write_whole,
)
from sampling import Chat, load, load_tokenizer, sample

FORMAT = 4  # of a run's folder; runs of another are not resumed
HERE = Path(os.path.relpath(Path(__file__).parent))
SEEDS = HERE / "data" / "seeds.jsonl"
GPU_MODEL, CPU_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct", HERE / "tiny"
BLOCK = 4096            # samples drawn together; those of a block that a crash cut short are drawn again
HELD_OUT = 0.1          # share of the prompts whose pairs pick the epoch instead of training
EVAL_ANSWERS = 4        # answers per held-out prompt
OASST_PROMPTS = 800     # of oasst1: with N judgments per reply 600 are enough for the paper's 1,630 EFT examples and more
HELD_RANKED = 0.25      # share of the ranked prompts that measure the judge instead, if --ranked names no others
DIAGNOSED = 20          # answers whose comparisons are made again; in iterations that train no judge, no others are compared
SAME = 1e-9             # scores and ratings this close are equal: the same numbers added in another order differ in the last bit


# ---- the method, as pure functions of numbers

def position_weights(first_wins, second_wins):
    """Weights of a win shown first and of a win shown second (w1, w2) [E2]; the rarer kind weighs more. Their sum is 1."""
    if not (0 <= first_wins < math.inf and 0 <= second_wins < math.inf):
        raise ValueError("first_wins and second_wins must be finite and not negative")
    if first_wins + second_wins == 0:
        return 0.5, 0.5
    return second_wins / (first_wins + second_wins), first_wins / (first_wins + second_wins)  # [E2]


def battle_matrix(verdicts, w1, w2):
    """How much each judgment won against each other, (N, N) [E3]. verdicts[m, n]: with m shown first, 1 if m won, -1 if n did, 0 if neither."""
    r = checked_verdicts(verdicts)
    if not (0 <= w1 <= 1 and 0 <= w2 <= 1):
        raise ValueError("w1 and w2 must be in [0, 1]")
    return w1 * (r == 1) + w2 * (r.T == -1)  # [E3]


def checked_verdicts(verdicts):
    r = np.asarray(verdicts)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not np.isin(r, (-1, 0, 1)).all():
        raise ValueError("verdicts must be a square matrix of -1, 0 and 1")
    return r


def elo(battles, ridge=1e-6):
    """Bradley-Terry ratings that best explain a battle matrix, (N,), mean zero, natural-log scale [E4].

    Maximises sum_mn B_mn log sigmoid(e_m - e_n) - ridge/2 sum e^2 by Newton's method, with B scaled to a mean of one battle per pair. The
    ridge (1e-6) keeps ratings finite where a judgment won every battle (12 apart, if there are two) and moves regular ones by about 1e-5.
    """
    B = np.asarray(battles, dtype=float)
    if B.ndim != 2 or B.shape[0] != B.shape[1] or not np.isfinite(B).all() or (B < 0).any():
        raise ValueError("battles must be a square matrix of finite numbers >= 0")
    B = B * (1 - np.eye(len(B)))
    e = np.zeros(len(B))
    if B.sum() == 0:
        return e
    B = B * (len(B) * (len(B) - 1) / 2 / B.sum())

    def objective(e):
        return (B * -np.logaddexp(0, e[None, :] - e[:, None])).sum() - ridge / 2 * (e @ e)  # [E4]

    def slopes(e):
        p = 1 / (1 + np.exp(np.clip(e[:, None] - e[None, :], -500, 500)))  # P(m loses to n)
        weight = (B + B.T) * p * (1 - p)
        return (B * p).sum(1) - (B * p).sum(0) - ridge * e, np.diag(weight.sum(1)) - weight + ridge * np.eye(len(e))

    e = newton(objective, slopes, e)
    return e - e.mean()


def newton(objective, slopes, x):
    """The maximum of a concave objective(x), from x on, by Newton's method with steps that are cut where they lead downhill.

    slopes(x): the gradient, and the Hessian with its sign changed.
    """
    for _ in range(200):
        gradient, curvature = slopes(x)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1, 2 / max(np.abs(step).max(), 1e-300))
        while objective(x + step) < objective(x) and np.abs(step).max() > 1e-12:
            step /= 2
        x = x + step
        if np.abs(step).max() < 1e-10:
            break
    return x


def elo_with_advantage(verdicts, ridge=1e-6):
    """Ratings (N,), mean zero, and what being shown first is worth, from one fit instead of weights [E2]: (ratings, advantage).

    P(m, shown first, beats n) = sigmoid(e_m - e_n + d): Bradley-Terry with an order effect (Davidson and Beaver 1977), natural-log scale.
    verdicts as in `battle_matrix`; scaling and ridge, on d as well, as in `elo`. Positive d: the first place helps.
    """
    r = checked_verdicts(verdicts)
    first, second = np.nonzero(r * (1 - np.eye(len(r))))
    x = np.concatenate([np.eye(len(r))[first] - np.eye(len(r))[second], np.ones((len(first), 1))], 1)  # (comparisons, N + 1)
    y = np.where(r[first, second] == 1, 1.0, -1.0)
    scale = len(r) * (len(r) - 1) / 2 / max(1, len(y))

    def objective(theta):
        return -scale * np.logaddexp(0, -y * (x @ theta)).sum() - ridge / 2 * (theta @ theta)

    def slopes(theta):
        lost = 1 / (1 + np.exp(np.clip(y * (x @ theta), -500, 500)))  # the probability of what did not happen
        return scale * x.T @ (y * lost) - ridge * theta, scale * x.T @ (x * (lost * (1 - lost))[:, None]) + ridge * np.eye(len(theta))

    theta = newton(objective, slopes, np.zeros(len(r) + 1))
    return theta[:-1] - theta[:-1].mean(), float(theta[-1])


def actor_pair(scores, lengths, rho):
    """Indices (chosen, rejected) of one prompt's answers with length control, or None [E1].

    scores (K,): mean judge scores, NaN where no judgment was valid. lengths (K,): characters. rho in [0, 1]: 0 is best against worst.
    None: fewer than two scores, all scores equal, or the same answer on both sides. Equal lengths: the better, or worse, score decides.
    """
    scores, lengths = np.asarray(scores, dtype=float), np.asarray(lengths, dtype=float)
    if scores.ndim != 1 or scores.shape != lengths.shape or np.isinf(scores).any() or not (lengths >= 0).all() or not 0 <= rho <= 1:
        raise ValueError("scores (finite or NaN) and lengths (>= 0) must be lists of the same length, and rho must be in [0, 1]")
    scored = [i for i in range(len(scores)) if not math.isnan(scores[i])]
    if len(scored) < 2:
        return None
    low, high = min(scores[scored]), max(scores[scored])
    if high - low < SAME:
        return None
    top = [i for i in scored if scores[i] >= (1 - rho) * high + rho * low - SAME]     # [E1]
    bottom = [i for i in scored if scores[i] <= (1 - rho) * low + rho * high + SAME]  # [E1]
    chosen = min(top, key=lambda i: (lengths[i], -scores[i]))
    rejected = max(bottom, key=lambda i: (lengths[i], -scores[i]))
    return (chosen, rejected) if chosen != rejected else None


def judge_pair(ratings, lengths, max_length=None):
    """Indices (chosen, rejected): the highest and the lowest rated judgment, or None if all are equal or the chosen one is too long.

    lengths, max_length: characters. Equal ratings: the shorter is chosen, the longer rejected.
    """
    ratings, lengths = numbers("ratings", ratings), numbers("lengths", lengths, 0)
    if len(ratings) != len(lengths):
        raise ValueError("ratings and lengths must have the same length")
    if np.ptp(ratings) < SAME:
        return None
    chosen = min(np.flatnonzero(ratings > ratings.max() - SAME).tolist(), key=lambda i: lengths[i])
    rejected = max(np.flatnonzero(ratings < ratings.min() + SAME).tolist(), key=lambda i: lengths[i])
    return None if max_length and lengths[chosen] > max_length else (chosen, rejected)


# ---- settings

def option(default, help, **more):
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run; the command line is made from it. Schedules hold one value per iteration, or one for all."""

    iters: int = option(4, "iterations")
    model: str = option(None, f"hub name or folder (default: {GPU_MODEL} on CUDA, the tiny world elsewhere)")
    out: str = option(None, "the run's folder; an existing one is resumed (default: runs/ and the model's name)")
    seed: int = option(0, "of every random choice")
    prompts: str = option(None, "JSONL with \"prompt\", or one prompt a line (default: the model invents them from data/seeds.jsonl)")
    prompts_per_iter: int = option(5000, "prompts per iteration, none used twice")
    eval_prompts: str = option(str(HERE / "data" / "eval.jsonl"), "held-out prompts that measure and never train")
    responses: int = option(7, "answers per prompt (K)")
    judgments: int = option(11, "judgments per answer (N)")
    rho: tuple = option((0.0, 0.32, 0.32, 0.40), "length control per iteration, 0 = none", type=float)
    judge_iters: int = option(2, "how many iterations, from the first, train the judge too")
    max_response_chars: tuple = option((2500, 0, 0, 0), "a longer chosen answer drops its pair, per iteration, 0 = no limit", type=int)
    max_judgment_chars: tuple = option((1100, 1000, 0, 0), "a longer chosen judgment drops its pair, per iteration, 0 = no limit", type=int)
    max_answer_tokens: int = option(1024, "longest answer, in tokens")
    max_judgment_tokens: int = option(512, "longest judgment, in tokens")
    max_verdict_tokens: int = option(512, "longest meta-judgment, in tokens")
    temperature: float = option(0.8, "of all sampling")
    top_p: float = option(0.95, "of all sampling")
    beta: float = option(0.1, "of DPO")
    lr: float = option(5e-5, "peak learning rate of the adapter")
    batch_size: int = option(32, "pairs per optimizer step")
    epochs: int = option(10, "of DPO; the best one on held-out pairs is kept")
    eft_epochs: int = option(3, "of the warm start")
    lora_rank: int = option(16, "rank of the adapter")
    bits: int = option(None, "4 (NF4), 16 or 32 (default: 4 on CUDA, 32 elsewhere)", choices=[4, 16, 32])
    max_tokens_in_cache: int = option(None, "keys and values that sampling keeps, in tokens (default: what fits into memory)")
    rubric: str = option(None, "a file with another rubric; needs --max-score")
    max_score: int = option(5, "the rubric's highest score")
    eft: str = option(None, "JSONL of human-ranked replies for the warm start (default: oasst1 from the hub)")
    ranked: str = option(None, "JSONL of human-ranked replies that measure the judge and never train (default: a quarter of --eft's)")
    position_advantage: bool = option(False, "rate judgments by one fit with an advantage of the first place, instead of position weights")
    no_meta_judge: bool = option(False, "ablation: train the actor only (Self-Rewarding with length control)")
    no_position_weights: bool = option(False, "ablation: a win counts the same shown first or second")
    no_eft: bool = option(False, "ablation: no warm start")

    def __post_init__(self):
        def check(good, name, must):
            if not good:
                value = getattr(self, name)
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise ValueError(f"--{name.replace('_', '-')} must be {must}, not {shown}")

        for name, least in {"iters": 1, "seed": 0, "prompts_per_iter": 1, "responses": 2, "judgments": 1 if self.no_meta_judge else 2,
                            "judge_iters": 0, "max_answer_tokens": 1, "max_judgment_tokens": 1, "max_verdict_tokens": 1, "temperature": 0,
                            "batch_size": 1,
                            "epochs": 1, "eft_epochs": 1, "lora_rank": 1, "max_score": 1}.items():
            check(getattr(self, name) >= least, name, f"at least {least}")
        check(self.max_tokens_in_cache is None or self.max_tokens_in_cache >= 1, "max_tokens_in_cache", "at least 1")
        check(not (self.position_advantage and self.no_position_weights), "position_advantage", "without --no-position-weights")
        check(self.bits in (None, 4, 16, 32), "bits", "4, 16 or 32")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 < self.beta < math.inf, "beta", "above 0")
        check(0 < self.lr < math.inf, "lr", "above 0")
        check(self.temperature < math.inf, "temperature", "finite")
        check(all(limit >= 0 for limit in self.max_response_chars), "max_response_chars", "0 or more")
        check(all(limit >= 0 for limit in self.max_judgment_chars), "max_judgment_chars", "0 or more")
        check(all(0 <= rho <= 1 for rho in self.rho), "rho", "in [0, 1]")
        for name in ("rho", "max_response_chars", "max_judgment_chars"):
            default = next(field.default for field in dataclasses.fields(self) if field.name == name)
            check(len(getattr(self, name)) in (1, self.iters) or getattr(self, name) == default, name, f"1 or {self.iters} values, one per iteration")

    def at(self, name, t):
        """The value of a schedule in iteration t = 1, 2, ...; the last value goes on."""
        values = getattr(self, name)
        return values[min(t, len(values)) - 1]


def parse_settings(argv=None):
    """(Settings, whether only the plan is wanted) from the command line, over the model folder's preset.json, over the defaults."""
    parser = Parser(description="Meta-Rewarding: a model trains itself as actor and as judge.", allow_abbrev=False,
                    epilog="Defaults are the paper's; a model folder's preset.json, such as tiny/preset.json, comes before them.")
    for field in dataclasses.fields(Settings):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        about = field.metadata["help"]
        if field.default is not None and kind is not bool:
            about += f" (default: {' '.join(map(str, field.default)) if kind is tuple else field.default})"
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=about)
        elif kind is tuple:
            parser.add_argument(flag, type=field.metadata["type"], nargs="+", metavar="X", help=about)
        else:
            parser.add_argument(flag, type=kind, choices=field.metadata.get("choices"), help=about)
    parser.add_argument("--plan", action="store_true", help="say what the run will cost on this machine, and stop before it")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    only_plan = given.pop("plan")
    if "model" not in given:
        given["model"] = GPU_MODEL if torch.cuda.is_available() else str(CPU_MODEL)
        if not torch.cuda.is_available():
            print(f"No CUDA GPU found: running the tiny world ({given['model']}) on the CPU. Another model: --model NAME_OR_FOLDER.")
    if "rubric" in given and "max_score" not in given:
        raise ValueError("--rubric needs --max-score, the highest score that the rubric gives")
    settings = {"out": f"runs/{Path(given['model']).name}", "bits": 4 if torch.cuda.is_available() else 32} | read_preset(given["model"]) | given
    return Settings(**settings), only_plan


def read_preset(model):
    """The defaults a model folder wants, its preset.json; the files it names stand beside it."""
    file = Path(model) / "preset.json"
    if not file.is_file():
        return {}
    preset = read_json(file)
    fields = {field.name: (field.type, field.metadata.get("type")) for field in dataclasses.fields(Settings)}

    def fits(value, kind):
        return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)

    for name, value in preset.items() if isinstance(preset, dict) else [("not a record", None)]:
        kind, each = fields.get(name, (None, None))
        if kind is None or not (isinstance(value, list) and all(fits(one, each) for one in value) if each else fits(value, kind)):
            raise ValueError(f"{file}: {name}: no setting, or not of the right type")
    if "rubric" in preset and "max_score" not in preset:
        raise ValueError(f"{file}: rubric needs max_score, the highest score that the rubric gives")
    for name in preset.keys() & {"prompts", "eval_prompts", "eft", "ranked", "rubric"}:
        preset[name] = str(Path(model) / preset[name])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in preset.items()}


def read_json(file):
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: not JSON; put it back from a copy") from None


# ---- what a run reads

def ranked_replies(settings):
    """Human-ranked replies: (those of the warm start, those that measure the judge); no prompt is among both."""
    replies = eft_replies(settings) if settings.eft or not settings.no_eft else []
    texts = sorted({record["prompt"] for record in replies})
    held = set(random.Random(f"{settings.seed}/ranked").sample(texts, int(HELD_RANKED * len(texts))))
    measuring = [record for record in replies if record["prompt"] in held]
    if settings.ranked:
        measuring = words.read_prompts(settings.ranked, "--ranked", needs_replies=True)
        held = {record["prompt"] for record in measuring}
        if not settings.no_eft and held & set(texts):
            raise ValueError(f"--ranked {settings.ranked}: it has prompts that the warm start trains on: give others, or leave it out")
    return [] if settings.no_eft else [record for record in replies if record["prompt"] not in held], measuring


def eft_replies(settings):
    """--eft, or oasst1 from the hub."""
    if settings.eft:
        return words.read_prompts(settings.eft, "--eft", needs_replies=True)
    try:
        file = hf_hub_download("OpenAssistant/oasst1", "2023-04-12_oasst_ready.trees.jsonl.gz", repo_type="dataset")
        return [{"prompt_id": f"{i}", **record} for i, record in enumerate(itertools.islice(words.oasst_replies(file), OASST_PROMPTS))]
    except Exception as error:  # the hub's client raises many kinds, and a file that was cut in its cache others
        raise ValueError(f"oasst1 cannot be fetched ({type(error).__name__}): give ranked replies with --eft FILE, or start without "
                         "them with --no-eft") from None


def fingerprint(model):
    """What tells a model from another of the same name: of the hub its commit, of a folder what its files hold."""
    if not Path(model).is_dir():
        return transformers.AutoConfig.from_pretrained(model)._commit_hash
    files = sorted(file for pattern in ("*.safetensors", "*.json", "*.jinja") for file in Path(model).glob(pattern) if file.name != "preset.json")
    return digest([[file.name, sha256(file)] for file in files])


def sha256(file):
    """Of a file of any size."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def unused(records, held_out):
    """Prompts without repetitions and without those held out for measuring: (records, what was dropped)."""
    seen, held, kept, dropped = set(), {record["prompt"] for record in held_out}, [], Counter()
    for record in records:
        if record["prompt"] in held or record["prompt"] in seen:
            dropped["prompt held out for measuring" if record["prompt"] in held else "prompt a duplicate"] += 1
        else:
            seen.add(record["prompt"])
            kept.append(record)
    return kept, dropped


# ---- a run and its files

class Run:
    """Settings, model and folder of a run: what every stage needs."""

    def __init__(self, settings):
        self.settings, self.out = settings, Path(settings.out)
        self.rubric = words.read_text(settings.rubric, "--rubric").strip() if settings.rubric else words.RUBRIC
        self.eval_prompts = words.read_prompts(settings.eval_prompts, "--eval-prompts")
        self.chat = Chat(load_tokenizer(settings.model))
        self.replies, self.ranked = ranked_replies(settings)
        self.held_out = [*self.eval_prompts, *self.ranked]
        self.all_prompts, self.unfit = unused(words.read_prompts(settings.prompts), self.held_out) if settings.prompts else (None, Counter())
        if self.all_prompts is not None and len(self.all_prompts) < settings.iters * settings.prompts_per_iter:
            raise ValueError(f"--prompts {settings.prompts}: {len(self.all_prompts)} different prompts do not make {settings.iters} iterations "
                             f"of {settings.prompts_per_iter}: use fewer --iters, or --prompts-per-iter "
                             f"{len(self.all_prompts) // settings.iters} at most")
        if (self.out / "config.json").is_file() and rank() == 0:
            self.lock_folder()
        self.check_folder()
        self.model, self.tokenizer = load(settings.model, bits=settings.bits)
        check_logits(self.model)
        self.claim_folder()
        torch.manual_seed(settings.seed)
        self.model = add_lora(self.model, settings.lora_rank)
        self.tokens = 0  # drawn since the start of this process
        self.stage, self.stage_tokens = None, {}  # of the items in the files, by iteration, stage and file
        self.planning = False

    @functools.cached_property
    def told(self):
        """What config.json says of this run: its settings, what it reads, and versions."""
        given = {name: getattr(self.settings, name) for name in ("prompts", "eval_prompts", "eft", "ranked", "rubric")}
        files = {f"--{name.replace('_', '-')}": sha256(file) for name, file in given.items() if file}
        files |= {"--model": fingerprint(self.settings.model)} | ({} if self.all_prompts else {SEEDS.name: sha256(SEEDS)})
        files |= {} if self.settings.eft or self.settings.no_eft else {"oasst1": digest([self.replies, self.ranked])}
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
        return json.loads(json.dumps({"format": FORMAT, "settings": dataclasses.asdict(self.settings), "files": files, "versions": versions}))

    def check_folder(self):
        """Refuse a folder whose run had other settings, or other content in the files it read. More iterations may be asked for later.

        Returns notes on versions that have changed.
        """
        file = self.out / "config.json"
        if not file.exists():
            if (self.out / "summary.json").exists() or any(self.out.glob("iter*")):
                raise ValueError(f"{file} is missing, which says what run this is: put it back from a copy, or choose another --out")
            return []
        theirs, mine = read_json(file), self.told
        if not isinstance(theirs, dict) or not isinstance(theirs.get("settings"), dict):
            raise ValueError(f"{self.out} is no run's folder, though it has a config.json: choose another --out")
        if theirs.get("format") != FORMAT:
            raise ValueError(f"{self.out} holds a run of another version of this program, which left other files: choose another --out")
        iters = theirs["settings"].get("iters")
        done = len(read_json(self.out / "summary.json")) - 1 if (self.out / "summary.json").is_file() else 0
        if self.settings.iters < done:
            raise ValueError(f"{self.out} holds a run of {done} iterations: --iters may grow, not shrink")
        for name, value in mine["settings"].items():
            was = theirs["settings"].get(name)
            grown = isinstance(was, list) and len(was) == iters and value[:iters] == was  # a schedule goes on where it ended
            if name not in ("iters", "out", "max_tokens_in_cache") and value != was and not grown:
                raise ValueError(f"{self.out} holds a run with --{name.replace('_', '-')} {was}, not {value}: "
                                 "choose another --out, or the same settings")
        for name, content in theirs.get("files", {}).items():
            if content != mine["files"].get(name):
                raise ValueError(f"{self.out} holds a run whose {name} had another content: choose another --out")
        return [f"this run was begun with {name} {version}, and goes on with {mine['versions'].get(name)}"
                for name, version in theirs.get("versions", {}).items() if version != mine["versions"].get(name)]

    def lock_folder(self):
        """Refuse a folder that another process works on. The system drops the lock when this process ends, however it ends."""
        self.lock = open(self.out / "lock", "a")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.out} is in use by another process: wait for it, or choose another --out") from None

    def claim_folder(self):
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock_folder()
            for note in self.check_folder():  # once more: another process may have come first while the model was loaded
                print(f"note: {note}", file=sys.stderr)
            write_whole(self.out / "config.json", json.dumps(self.told, indent=1) + "\n")
        collect(None)

    def write(self, file, text):
        """Write a file whole, which one process does for all."""
        if rank() == 0:
            write_whole(file, text)
        collect(None)

    def write_jsonl(self, file, records):
        if rank() == 0:
            write_jsonl(file, records)
        collect(None)

    def folder(self, t):
        folder = self.out / f"iter{t}"
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def timed(self, t, stage):
        """Add the seconds this takes to those that iteration t's `stage` took before."""
        self.stage, start = stage, time.perf_counter()
        try:
            yield
        finally:
            if rank() == 0:
                seconds = self.seconds(t)
                seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - start, 1)
                write_whole(self.folder(t) / "seconds.json", json.dumps(seconds))

    def drawn_tokens(self, t):
        """Tokens drawn in iteration t, by stage."""
        tokens = Counter()
        for (iteration, stage, _), count in self.stage_tokens.items():
            if iteration == t:
                tokens[stage] += count
        return tokens

    def tokens_of(self, t):
        """Tokens of iteration t by stage: those drawn, and those that training went over."""
        trained = sum(line.get("tokens", 0) for line in read_jsonl(self.folder(t) / "train.jsonl"))
        return +(self.drawn_tokens(t) + Counter({"warm start, training" if t == 0 else "training": trained}))

    def seconds(self, t):
        try:
            return dict(read_json(self.folder(t) / "seconds.json"))
        except (OSError, ValueError, TypeError):  # no run shall end for want of its timings
            return {}

    def fill(self, t, name, items, ask, finish, n, max_new_tokens, label):
        """Sample for every item that iterT/name lacks, and append a line as each is finished; in the end the lines are in the order of items.

        items: dicts with "id". ask(item): its prompts. finish(item, samples): its record, samples being n for each prompt. Blocks of items
        are cut from the whole list, so that a resumed run draws in the same company as an uninterrupted one, and so the same to the bit.
        Of several processes each takes its share of the items and writes a file of its own, until all are done.
        """
        file = self.folder(t) / name
        known = on_disk(file)
        own = file if world() == 1 else Path(f"{file}.rank{rank()}")
        collect(None)  # all have read before any writes
        cut_torn_line(own)
        whole, items = items, share(items)
        tokens, start = self.tokens, time.perf_counter()

        def keep(item, number, nth, sample):
            self.tokens += len(sample.tokens)
            drawn[item["id"]][number][nth] = sample
            left[item["id"]] -= 1
            if left[item["id"]] == 0 and item["id"] not in known:
                length = sum(len(sample.tokens) for samples in drawn[item["id"]] for sample in samples)
                too_long = sum(sample.tokens == [] for (sample, *_) in drawn[item["id"]])
                record = {"id": item["id"], **finish(item, drawn[item["id"]]), "sampled_tokens": length, "too_long": too_long}
                known[item["id"]] = record if too_long else {key: value for key, value in record.items() if key != "too_long"}
                out.write(json.dumps(known[item["id"]]) + "\n")
                out.flush()
                bar.set_postfix_str(f"{(self.tokens - tokens) / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update()

        with open(own, "a", encoding="utf-8") as out, \
                tqdm(total=len(items), desc=f"{'plan' if self.planning else f'iteration {t}'}: {label}", unit="item",
                     initial=sum(item["id"] in known for item in items)) as bar:
            for block in blocks(((item, ask(item)) for item in items), lambda pair: n * len(pair[1]), BLOCK):
                if all(item["id"] in known for item, _ in block):
                    continue
                asked = [(item, number, text) for item, texts in block for number, text in enumerate(texts)]
                drawn = {item["id"]: [[None] * n for _ in texts] for item, texts in block}
                left = {item["id"]: n * len(texts) for item, texts in block}
                sample(self.model, self.tokenizer, [text for *_, text in asked], n, max_new_tokens=max_new_tokens,
                       temperature=self.settings.temperature, top_p=self.settings.top_p, seed=[self.settings.seed, t, name],
                       keys=[[item["id"], number] for item, number, _ in asked], capacity=self.settings.max_tokens_in_cache,
                       on_end=lambda place, nth, sample: keep(*asked[place][:2], nth, sample), skip_too_long=True)
        if world() > 1:
            collect(None)
            known = on_disk(file)
        records = [known[item["id"]] for item in whole]
        self.write_jsonl(file, records)
        if rank() == 0:
            for part in rank_files(file):
                part.unlink()
        self.stage_tokens[t, self.stage, name] = sum(record["sampled_tokens"] for record in records)
        self.tell_too_long(records, label, max_new_tokens)
        return records

    def tell_too_long(self, records, label, max_new_tokens):
        """Say how many prompts of a stage were too long. Raises ValueError if all were, since more of the same would follow."""
        too_long = [record["too_long"] for record in records if "too_long" in record]
        about = f"the model's context has no room for them and a reply of {max_new_tokens} tokens"
        if too_long and not any(record["sampled_tokens"] for record in records):
            raise ValueError(f"{label}: all prompts are too long, {about}: choose another --out and shorter prompts, answers or replies")
        if too_long and rank() == 0:
            print(f"{label}: {sum(too_long)} prompts are too long, {about}; they got none, and are counted", file=sys.stderr)


def rank_files(file):
    """What several processes have written of a stage's file, one each."""
    return file.parent.glob(f"{file.name}.rank*")


def on_disk(file):
    """The records of a stage by their "id", those of several processes' files included."""
    records = [record for source in (file, *rank_files(file)) for record in read_jsonl(source)]
    if not all(isinstance(record.get("id"), str) and isinstance(record.get("sampled_tokens"), int) for record in records):
        raise ValueError(f"{file}: a line is no record of this run; take it out, and it is drawn again")
    return {record["id"]: record for record in records}


def cut_torn_line(file):
    """Cut a last line without its newline off a file: the process died while writing it."""
    if file.exists():
        text = file.read_bytes()
        os.truncate(file, text.rfind(b"\n") + 1)


def blocks(items, size, limit):
    """Split items, in order, into blocks whose sizes add up to at most `limit`, at least one item each."""
    block, used = [], 0
    for item in items:
        if block and used + size(item) > limit:
            yield block
            block, used = [], 0
        block.append(item)
        used += size(item)
    if block:
        yield block


# ---- the three roles

def answer(run, t, prompts, name="responses.jsonl", n=None, label="answers"):
    """As actor, answer prompts: records with "responses", n samples each."""
    def finish(item, samples):
        return {**item, "responses": [{"text": s.text, "finished": s.finished, "tokens": len(s.tokens)} for s in samples[0]]}

    return run.fill(t, name, [{**p, "id": p["prompt_id"]} for p in prompts], lambda item: [item["prompt"]], finish,
                    n or run.settings.responses, run.settings.max_answer_tokens, label)


def judge(run, t, answers, name="judgments.jsonl", label="judgments"):
    """As judge, score answers: records with "judgments", their "scores" (None where cut off or malformed) and the mean "score"."""
    def ask(item):
        return [words.judge_prompt(item["prompt"], item["text"], run.rubric)]

    def finish(item, samples):
        judgments = [{"text": s.text, "finished": s.finished, "score": words.parse_score(s.text, run.settings.max_score) if s.finished else None}
                     for s in samples[0]]
        valid = [j["score"] for j in judgments if j["score"] is not None]
        return {**item, "judgments": judgments, "scores": [j["score"] for j in judgments], "score": float(np.mean(valid)) if valid else None}

    return run.fill(t, name, answers, ask, finish, run.settings.judgments, run.settings.max_judgment_tokens, label)


def meta_judge(run, t, answers, name="battles.jsonl", label="comparisons"):
    """As meta-judge, compare every two valid judgments of an answer in both orders: records with "verdicts" (N, N)."""
    def ask(item):
        texts = item["texts"]
        return [words.meta_judge_prompt(item["prompt"], item["text"], texts[m], texts[n], run.rubric)
                for m, n in itertools.permutations(range(len(texts)), 2)]

    def finish(item, samples):
        verdicts = np.zeros((len(item["texts"]), len(item["texts"])), dtype=int)
        said = []
        for (m, n), (s,) in zip(itertools.permutations(range(len(item["texts"])), 2), samples):
            winner = words.parse_winner(s.text) if s.finished else None
            verdicts[m, n] = {"A": 1, "B": -1, None: 0}[winner]
            said.append({"first": m, "second": n, "text": s.text, "finished": s.finished})
        return {**item, "verdicts": verdicts.tolist(), "said": said}

    return run.fill(t, name, answers, ask, finish, 1, run.settings.max_verdict_tokens, label)


def request(run, t, items, number=0):
    """Ask for a new task after some seed tasks: records with "task" (None where cut off or malformed)."""
    return run.fill(t, f"requests{number}.jsonl", items, lambda item: [words.new_task_prompt(item["seeds"])],
                    lambda item, s: {"task": words.parse_task(s[0][0].text) if s[0][0].finished else None}, 1, 256, "new prompts")


# ---- the stages of an iteration

def choose_prompts(run, t):
    """The prompts of iteration t, none of them used before, from the file or invented by the model: (records, what was dropped)."""
    count = run.settings.prompts_per_iter
    if run.all_prompts is not None:
        chosen, dropped = run.all_prompts[(t - 1) * count: t * count], run.unfit if t == 1 else Counter()
    else:
        chosen, dropped = invent_prompts(run, t, count)
    run.write_jsonl(run.folder(t) / "prompts.jsonl", chosen)
    return chosen, dropped


def invent_prompts(run, t, count):
    """Self-instruct: ask for one more task after 8 seed tasks, drop what is malformed or nearly a duplicate of any earlier one."""
    seeds = [record["prompt"] for record in words.read_prompts(SEEDS)]
    earlier = []
    for i in range(1, t):
        file = run.folder(i) / "prompts.jsonl"
        earlier += [record["prompt"] for record in read_jsonl(file)]
        if len(earlier) < i * count:
            raise ValueError(f"{file} is missing or cut short, and no prompt may be used twice: put it back from a copy")
    replies, chosen = [], []
    for number in itertools.count():  # as many as are missing, until none is; a file for each time
        requests = [{"id": f"{i}", "seeds": random.Random(f"{run.settings.seed}/{t}/{i}").sample(seeds, 8)}
                    for i in range(len(replies), len(replies) + max(32, count - len(chosen)))]
        replies += request(run, t, requests, number)
        unlike = words.Unlike([*seeds, *earlier, *(record["prompt"] for record in run.held_out)])
        tasks = [reply for reply in replies if reply["task"]]
        chosen = [{"prompt_id": f"{t}-{reply['id']}", "prompt": reply["task"]} for reply in tasks if unlike.add(reply["task"])]
        if len(chosen) >= count:
            break
        if len(replies) > 20 * count + 100:
            raise ValueError(f"the model invents too few new prompts ({len(chosen)} in {len(replies)} tries): choose another --out and give "
                             "a file with --prompts")
    return chosen[:count], +Counter({"new prompt malformed or cut off": len(replies) - len(tasks),
                                     "new prompt nearly a duplicate": len(tasks) - len(chosen),
                                     "new prompt not needed": max(0, len(chosen) - count)})


def unique_answers(records):
    """One item per different finished answer, and what was dropped on the way."""
    dropped, items = Counter(), []
    for record in records:
        if record.get("too_long"):
            dropped["prompt too long for the model's context"] += 1
            continue
        seen = set()
        for number, response in enumerate(record["responses"]):
            if not response["finished"]:
                dropped["answer cut off"] += 1
            elif not response["text"].strip():
                dropped["answer empty"] += 1
            elif response["text"] in seen:
                dropped["answer a duplicate"] += 1
            else:
                seen.add(response["text"])
                items.append({"id": f"{record['prompt_id']}/{number}", "prompt_id": record["prompt_id"], "prompt": record["prompt"],
                              "text": response["text"], **true_score(record, response["text"])})
        if not seen:
            dropped["prompt without a finished answer"] += 1
    return items, dropped


def true_score(record, text):
    return {"truth": truth(record["checks"], text)} if record.get("checks") else {}


def actor_pairs(answers, rho, max_chars):
    """One pair of answers per prompt [E1]: returns (pairs, what was dropped)."""
    pairs, dropped = [], Counter()
    for prompt_id, group in by_prompt(answers).items():
        scores = [math.nan if a["score"] is None else a["score"] for a in group]
        pair = actor_pair(scores, [len(a["text"]) for a in group], rho)
        if pair is None:
            scored = [score for score in scores if not math.isnan(score)]
            dropped["actor pair: fewer than two answers with a score" if len(scored) < 2 else "actor pair: all scores equal"
                    if max(scored) - min(scored) < SAME else "actor pair: the same answer on both sides"] += 1
            continue
        chosen, rejected = (group[i] for i in pair)
        if max_chars and len(chosen["text"]) > max_chars:
            dropped["actor pair: chosen answer too long"] += 1
            continue
        pairs.append(as_pair("actor", prompt_id, group[0]["prompt"], chosen["text"], rejected["text"],
                             chosen_score=chosen["score"], rejected_score=rejected["score"]))
    return pairs, dropped


def bare_answer(record):
    """An answer without what was judged of it."""
    return {key: record[key] for key in ("id", "prompt_id", "prompt", "text", "truth") if key in record}


def most_varied(answers, seed):
    """Per prompt the answer whose judgments vary most, ties at random, as an item with its valid judgments."""
    items, dropped = [], Counter()
    for prompt_id, group in by_prompt(answers).items():
        variances = [np.var([s for s in a["scores"] if s is not None]) if sum(s is not None for s in a["scores"]) > 1 else -1 for a in group]
        best = [i for i, variance in enumerate(variances) if variance >= max(variances) - 1e-12]
        record = group[random.Random(f"{seed}/{prompt_id}").choice(best)]
        if max(variances) < 0:
            dropped["judge pair: no answer with two valid judgments"] += 1
            continue
        valid = [j for j in record["judgments"] if j["score"] is not None]
        items.append(bare_answer(record) | {"texts": [j["text"] for j in valid], "scores": [j["score"] for j in valid]})
    return items, dropped


def rated(battles, weights):
    """The battles with the "ratings" of their judgments [E3] [E4] and the (chosen, rejected) "pair" that these make, or None.

    weights None: the ratings are those of the fit with an advantage of the first place.
    """
    records = []
    for battle in battles:
        B = None if weights is None else battle_matrix(battle["verdicts"], *weights)  # [E3]
        ratings = elo_with_advantage(battle["verdicts"])[0] if B is None else elo(B)  # [E4]
        records.append({**battle, "battles": None if B is None else B.tolist(), "ratings": ratings.tolist(),
                        "pair": judge_pair(ratings, [len(text) for text in battle["texts"]])})
    return records


def repeated(run, t, battles):
    """The same comparisons once more, every verdict drawn afresh; shuffled, so that no judgment wins a draw by its number again."""
    items = []
    for battle in battles:
        order = random.Random(f"{run.settings.seed}/{t}/{battle['id']}").sample(range(len(battle["texts"])), len(battle["texts"]))
        items.append(bare_answer(battle) | {"order": order, **{name: [battle[name][i] for i in order] for name in ("texts", "scores")}})
    return meta_judge(run, t, items, "repeats.jsonl", "comparisons, repeated")


def judge_pairs(battles, rubric, max_chars):
    """One pair of judgments per compared answer, by their ratings (see `rated`): returns (pairs, what was dropped)."""
    pairs, dropped = [], Counter()
    for battle in battles:
        unread, too_long = sum(row.count(0) for row in battle["verdicts"]) - len(battle["verdicts"]), battle.get("too_long", 0)
        dropped += Counter({"verdict malformed or cut off": unread - too_long, "judgments too long to be compared": too_long})
        texts, ratings = battle["texts"], battle["ratings"]
        if battle["pair"] is None:
            dropped["judge pair: all ratings equal"] += 1
            continue
        chosen, rejected = battle["pair"]
        if max_chars and len(texts[chosen]) > max_chars:
            dropped["judge pair: chosen judgment too long"] += 1
            continue
        if texts[chosen] == texts[rejected]:
            dropped["judge pair: the same judgment on both sides"] += 1
            continue
        prompt = words.judge_prompt(battle["prompt"], battle["text"], rubric)
        pairs.append(as_pair("judge", battle["prompt_id"], prompt, texts[chosen], texts[rejected],
                             chosen_rating=ratings[chosen], rejected_rating=ratings[rejected],
                             chosen_score=battle["scores"][chosen], rejected_score=battle["scores"][rejected]))
    return pairs, dropped


def as_pair(kind, prompt_id, prompt, chosen, rejected, **figures):
    """A line of pairs.jsonl, which TRL's DPOTrainer reads as it is."""
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}], "kind": kind, "prompt_id": prompt_id, **figures}


def hold_out(examples, seed):
    """Split off the examples of a tenth of the prompts, if there are enough: (training, held out)."""
    ids = sorted({example["prompt_id"] for example in examples})
    held = set(random.Random(f"{seed}/held out").sample(ids, int(HELD_OUT * len(ids))))
    return [e for e in examples if e["prompt_id"] not in held], [e for e in examples if e["prompt_id"] in held]


def train(run, t, pairs):
    """DPO [E5] from M_{t-1} on actor and judge pairs together; the adapter becomes M_t."""
    folder, settings = run.folder(t), run.settings
    if not pairs:
        print(f"Iteration {t}: no pairs, so nothing to train on; M_{t} is M_{t - 1}. What was dropped is in the table below.")
        save_adapter(run.model, folder / "adapter")
        return None
    return train_dpo(run.model, *hold_out(encoded(run, pairs), settings.seed), folder, beta=settings.beta, epochs=settings.epochs,
                     batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed)


def encoded(run, examples):
    """Texts of pairs, or of EFT examples, as token ids: "prompt_ids", and "chosen_ids" and "rejected_ids" or "answer_ids". "line": in their file."""
    names = {"chosen": "chosen_ids", "rejected": "rejected_ids", "completion": "answer_ids"}
    return [{"prompt_id": example["prompt_id"], "line": line, "prompt_ids": run.chat.prompt(example["prompt"][0]["content"])}
            | {names[key]: run.chat.answer(example[key][0]["content"]) for key in names.keys() & example.keys()}
            for line, example in enumerate(examples, 1)]


def warm_start(run):
    """M_0: SFT on the seed's own judgments of human-ranked replies, kept where they order the replies as people did."""
    folder, settings = run.folder(0), run.settings
    if settings.no_eft:
        save_adapter(run.model, folder / "adapter")
        return {}, None
    judged = judge(run, 0, ranked_items(run.replies), label="judgments of ranked replies")
    examples, dropped = agreeing_judgments(judged, run.rubric, settings.seed)
    if not examples:
        lost = "; ".join(f"{reason} {count}" for reason, count in dropped.items())
        raise ValueError(f"the seed model gave no judgment that agrees with the ranked replies ({lost}): choose another --out and --no-eft")
    run.write_jsonl(folder / "sft.jsonl", examples)
    best = train_sft(run.model, *hold_out(encoded(run, examples), settings.seed), folder, epochs=settings.eft_epochs, batch_size=settings.batch_size,
                     lr=settings.lr, seed=settings.seed)
    return dropped, best


def ranked_items(records):
    return [{"id": f"{r['prompt_id']}/{i}", "prompt_id": r["prompt_id"], "prompt": r["prompt"], "text": reply["text"], "rank": reply["rank"]}
            for r in records for i, reply in enumerate(r["replies"])]


def agreeing_judgments(judged, rubric, seed):
    """The EFT examples: (examples, what was dropped).

    The j-th judgments of all replies to a prompt are kept together when their scores put no reply above one that people ranked higher, and
    the best above the worst. No score may then be more than twice as frequent as the median score.
    """
    kept, dropped = [], Counter()
    for prompt_id, group in by_prompt(judged).items():
        for judgments in zip(*(record["judgments"] for record in group)):
            scores = [j["score"] for j in judgments]
            missing = sum(score is None for score in scores)
            if missing:
                dropped["EFT judgments malformed or cut off"] += missing
                dropped["EFT judgments lost with one of their round"] += len(scores) - missing
                continue
            ordered = [score for _, score in sorted(zip([record["rank"] for record in group], scores), key=lambda x: (x[0], -x[1]))]
            if ordered[0] == ordered[-1] or any(a < b for a, b in zip(ordered, ordered[1:])):
                dropped["EFT judgments that disagree with the ranks"] += len(scores)
                continue
            kept += [(score, prompt_id, record, j["text"]) for record, j, score in zip(group, judgments, scores)]
    random.Random(f"{seed}/EFT").shuffle(kept)
    cap = 2 * np.median(list(Counter(score for score, *_ in kept).values())) if kept else 0
    examples, used = [], Counter()
    for score, prompt_id, record, text in kept:
        used[score] += 1
        if used[score] > cap:
            dropped["EFT judgments with a too frequent score"] += 1
            continue
        examples.append({"prompt": [{"role": "user", "content": words.judge_prompt(record["prompt"], record["text"], rubric)}],
                         "completion": [{"role": "assistant", "content": text}], "prompt_id": prompt_id, "score": score})
    return examples, dropped


def measure(run, t):
    """Actor and judge of M_t on held-out prompts. The judge is measured on M_0's answers throughout, so that its figures compare."""
    records = answer(run, t, run.eval_prompts, "eval_responses.jsonl", EVAL_ANSWERS, "held-out answers")
    items = [{"id": f"{r['prompt_id']}/{i}", "prompt_id": r["prompt_id"], "prompt": r["prompt"], **response, **true_score(r, response["text"])}
             for r in records for i, response in enumerate(r["responses"])]
    own = judge(run, t, items, "eval.jsonl", "held-out judgments")
    reference = own
    if t > 0:
        first = read_jsonl(run.folder(0) / "eval.jsonl")
        if len(first) < len(run.eval_prompts) * EVAL_ANSWERS:
            raise ValueError(f"{run.folder(0)}/eval.jsonl is missing or cut short, and the judge is measured on it: put it back from a copy, "
                             "or start again in another folder")
        items = [{key: value for key, value in record.items() if key not in ("judgments", "scores", "score", "sampled_tokens")} for record in first]
        reference = judge(run, t, items, "eval_judge.jsonl", "held-out judgments of M_0's answers")
    figures = {"actor": measure_actor(own), "judge": measure_judge([record for record in reference if record["finished"]])}
    if run.ranked:
        figures["judge"] |= measure_people(judge(run, t, ranked_items(run.ranked), "eval_ranked.jsonl", "judgments of replies ranked by people"))
    return figures


# ---- what a run will cost

CALIBRATION = (64, 256, 1024)  # samples of each role that are timed, one lot after the other
PATIENCE = 30                  # seconds after which no larger lot is tried


@dataclass
class Cost:
    """What a stage takes: seconds `each` per sample or pair and `fixed` per call; tokens and bytes on disk per sample or pair."""
    fixed: float
    each: float
    tokens: float
    disk: float
    memory: int  # peak in bytes while it was measured: of the GPU, or of the process


def fitted(lots):
    """The Cost that lots (count, tokens, seconds, bytes, memory) show. What did not grow between the two largest is fixed: samples that end
    while no other waits leave slots empty, for few samples as long as for many."""
    n, tokens, seconds, size, memory = lots[-1]
    each = seconds / n
    if len(lots) > 1 and n > lots[-2][0]:
        each = min(max((seconds - lots[-2][2]) / (n - lots[-2][0]), each / 2), each)
    return Cost(seconds - each * n, each, tokens / n, size / n, memory)


def clocked(run, work):
    """Call work(t) for an iteration of its own: returns what it returns and (tokens, seconds, bytes on disk, peak memory)."""
    t = len(list(run.out.glob("iter*")))
    cuda = run.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    folder, tokens, start = run.folder(t), run.tokens, time.perf_counter()
    result = work(t)
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_reserved() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result, (run.tokens - tokens, seconds, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), memory)


def sampling_cost(run, role, items, per_item, total):
    """The Cost of role(run, t, items), which draws per_item samples for each, and the records of the last lot; no lot is larger than total."""
    lots = []
    for size in CALIBRATION:
        count = max(1, round(min(size, total) / per_item))
        lot = [items[i % len(items)] | ({"id": f"{i}", "prompt_id": f"{i}"} if i >= len(items) else {}) for i in range(count)]
        records, cost = clocked(run, lambda t: role(run, t, lot))
        lots.append((count * per_item, *cost))
        if size >= total or cost[1] > PATIENCE:
            break
    return fitted(lots), records


def training_cost(run, train, examples, epochs, count):
    """The Cost per example of so many epochs on `count` examples, from one and from two epochs on two batches."""
    settings, part, lots = run.settings, encoded(run, examples[: 2 * run.settings.batch_size]), []

    def work(t):
        train(run.model, part, [], run.folder(t), epochs=n, batch_size=settings.batch_size, lr=settings.lr, seed=0)
        (run.folder(t) / "checkpoint.safetensors").unlink()  # as `loop` does

    for n in (1, 2):
        lots.append((n, *clocked(run, work)[1]))
    cost = fitted(lots)
    tokens = sum(example["tokens"] for example in part) * epochs / len(part)
    return Cost(0, (cost.fixed + cost.each * epochs) / len(part), tokens, lots[0][3] / count, cost.memory)  # the adapter, whatever the count


def stage_costs(run):
    """For each stage of the whole run: (name, samples or pairs, how often it is called, Cost)."""
    settings, stages = run.settings, []
    K, N, iters, asked = settings.responses, settings.judgments, settings.iters, settings.iters * settings.prompts_per_iter

    def add(name, count, calls, cost):
        stages.append((name, count, calls * -(-count // max(1, calls * BLOCK)), cost))

    if run.replies:
        items = ranked_items(run.replies)
        cost, records = sampling_cost(run, judge, items, N, len(items) * N)
        examples, _ = agreeing_judgments(records, run.rubric, settings.seed)
        add("warm start, judgments", len(items) * N, 1, cost)
        if examples:
            count = round(len(examples) / len(records) * len(items))
            add("warm start, training", count, 1, training_cost(run, train_sft, examples, settings.eft_epochs, count))
    prompts = run.all_prompts
    if prompts is None:
        seeds = words.read_prompts(SEEDS)
        texts = [record["prompt"] for record in seeds]
        requests = [{"id": f"{i}", "seeds": random.Random(f"plan/{i}").sample(texts, 8)} for i in range(CALIBRATION[-1])]
        cost, records = sampling_cost(run, request, requests, 1, asked)
        unlike = words.Unlike(texts)
        usable = sum(bool(record["task"]) and unlike.add(record["task"]) for record in records) / len(records)
        if not usable:
            raise ValueError("the model invents no usable prompts: give a file with --prompts")
        add("new prompts", round(asked / usable), iters, cost)
        prompts = seeds
    answers, records = sampling_cost(run, answer, prompts, K, asked * K)
    add("answers", asked * K, iters, answers)
    items, _ = unique_answers(records)
    if not items:
        raise ValueError("the model finishes no answer: raise --max-answer-tokens")
    per_prompt = len(items) / len(records)
    judgments, judged = sampling_cost(run, judge, items, N, round(asked * per_prompt) * N)
    add("judgments", round(asked * per_prompt) * N, iters, judgments)
    actor = [as_pair("actor", "", group[0]["prompt"], group[0]["text"], group[-1]["text"]) for group in by_prompt(items).values() if len(group) > 1]
    compared = 0 if settings.no_meta_judge else min(iters, settings.judge_iters)
    varied, _ = most_varied(judged, settings.seed)
    if varied and not settings.no_meta_judge:
        each = round(np.mean([len(item["texts"]) * (len(item["texts"]) - 1) for item in varied]))
        count = each * (compared * settings.prompts_per_iter + (2 * iters - compared) * min(DIAGNOSED, settings.prompts_per_iter))
        cost, _ = sampling_cost(run, meta_judge, varied, each, count)
        add("comparisons", count, 2 * iters, cost)
    pairs = [as_pair("judge", "", words.judge_prompt(item["prompt"], item["text"], run.rubric), *item["texts"][:2]) for item in varied]
    both = [pair for two in zip(actor, pairs) for pair in two]
    for name, count, calls, pairs in [("training, both kinds", 2 * compared * settings.prompts_per_iter, compared, both),
                                      ("training, actor pairs", (iters - compared) * settings.prompts_per_iter, iters - compared, actor)]:
        if count and pairs:
            add(name, count, calls, training_cost(run, functools.partial(train_dpo, beta=settings.beta), pairs, settings.epochs, count / calls))
    held_out = len(run.eval_prompts) * EVAL_ANSWERS
    add("measuring, answers", held_out * (iters + 1), iters + 1, answers)
    add("measuring, judgments", (held_out * (2 * iters + 1) + len(ranked_items(run.ranked)) * (iters + 1)) * N,
        3 * iters + 2 if run.ranked else 2 * iters + 1, judgments)
    return stages


def plan(settings):
    """Print what a run with these settings will take on this machine: a few samples of each stage are drawn, timed and thrown away."""
    print("Timing a few samples of each stage; nothing of it is kept. What else this machine does meanwhile counts as well.")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = Run(dataclasses.replace(settings, out=folder))
        loading, run.planning = time.perf_counter() - start, True
        stages = stage_costs(run)
    rows = [(name, f"{count:,}", count * cost.tokens, count * cost.each + calls * cost.fixed, count * cost.disk, cost.memory)
            for name, count, calls, cost in stages]
    tokens, seconds, size, memory = (list(column) for column in list(zip(*rows))[2:])
    rows.append(("all, with loading", "", sum(tokens), sum(seconds) + loading, sum(size), max(memory)))
    print(f"\n{'stage':24}{'samples or pairs':>18}{'tokens':>9}{'time':>10}{'disk':>10}{'memory':>10}")
    for name, count, tokens, seconds, size, memory in rows:
        print(f"{name:24}{count:>18}{short(tokens):>9}{duration(seconds):>10}{short(size) + 'B':>10}{short(memory) + 'B':>10}")
    print(f"For {settings.iters} iterations, with answers and judgments like the seed model's and pairs from every prompt. Training counts the\n"
          f"tokens of each epoch. Memory is the peak of {'the GPU' if torch.cuda.is_available() else 'this process'}.")


def short(number):
    """A number with three digits and k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            break
        number /= 1000
    else:
        unit = "T"
    return f"{number:.{max(0, 2 - len(str(int(number))) + 1) if unit else 0}f}{unit}"


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- the loop

def iterate(run, t):
    """One iteration: answer, judge, meta-judge, select, train. Returns its figures for summary.json."""
    settings = run.settings
    with run.timed(t, "prompts"):
        prompts, dropped = choose_prompts(run, t)
    with run.timed(t, "answers"):
        answers, lost = unique_answers(answer(run, t, prompts))
        dropped += lost
    with run.timed(t, "judgments"):
        answers = judge(run, t, answers)
        dropped["answer too long to be judged"] = sum("too_long" in a for a in answers)
        dropped["judgment malformed or cut off"] = sum(score is None for a in answers if "too_long" not in a for score in a["scores"])
    pairs, lost = actor_pairs(answers, settings.at("rho", t), settings.at("max_response_chars", t))
    dropped += lost
    figures = {"meta_judge": None}
    if not settings.no_meta_judge:
        figures["meta_judge"], more, lost = compare_judgments(run, t, answers)
        dropped += lost
        pairs += more
    run.write_jsonl(run.folder(t) / "pairs.jsonl", pairs)
    kinds = Counter(pair["kind"] for pair in pairs)
    figures["pairs"] = {"actor": kinds["actor"], "judge": kinds["judge"], "dropped": {reason: n for reason, n in dropped.items() if n}}
    with run.timed(t, "training"):
        figures["train"] = train(run, t, pairs)
    return figures | {"tokens": run.tokens_of(t)}


def compare_judgments(run, t, answers):
    """The meta-judge's part of an iteration: (its figures, judge pairs, what was dropped).

    Where the judge trains, one answer of each prompt is compared; in later iterations some are, for the figures alone.
    """
    settings, trains = run.settings, t <= run.settings.judge_iters
    varied, dropped = most_varied(answers, settings.seed)
    some = {item["id"] for item in random.Random(f"{settings.seed}/{t}/diagnosed").sample(varied, min(DIAGNOSED, len(varied)))}
    with run.timed(t, "comparisons"):
        battles = meta_judge(run, t, varied if trains else [item for item in varied if item["id"] in some])
        again = repeated(run, t, [battle for battle in battles if battle["id"] in some])
    wins = Counter(v for battle in battles for row in battle["verdicts"] for v in row)
    weights = (0.5, 0.5) if settings.no_position_weights else None if settings.position_advantage else position_weights(wins[1], wins[-1])
    battles, again = rated(battles, weights), rated(again, weights)
    run.write_jsonl(run.folder(t) / "ratings.jsonl", [{key: battle[key] for key in ("id", "battles", "ratings", "pair")} for battle in battles])
    figures = measure_meta_judge(battles) | {"weights": weights, "answers": len(battles)}
    figures |= measure_repeats([battle for battle in battles if battle["id"] in some], again)
    pairs, lost = judge_pairs(battles, run.rubric, settings.at("max_judgment_chars", t)) if trains else ([], Counter())
    return figures, pairs, dropped + lost if trains else lost


def start(run):
    """Iteration 0: the warm start."""
    with run.timed(0, "warm start"):
        dropped, best = warm_start(run)
    return {"meta_judge": None, "pairs": {"actor": 0, "judge": 0, "dropped": dict(dropped)}, "train": best, "tokens": run.tokens_of(0)}


def loop(run):
    """All iterations, from wherever the run's folder stands. Returns the records of summary.json."""
    file = run.out / "summary.json"
    records = read_json(file) if file.exists() else []
    notes = report(run.out) if records and rank() == 0 else []  # the process may have died before it drew the last one
    for t in range(run.settings.iters + 1):
        if t < len(records):
            continue
        figures_file = run.folder(t) / "figures.json"
        if not figures_file.exists():  # iteration t is not trained yet
            if t:
                set_adapter(run.model, run.folder(t - 1) / "adapter", records[-1]["adapter"])
            made = iterate(run, t) if t else start(run)
            run.write(figures_file, json.dumps(made | {"adapter": sha256(run.folder(t) / "adapter" / "adapter_model.safetensors")}))
        if rank() == 0:
            (run.folder(t) / "checkpoint.safetensors").unlink(missing_ok=True)
        figures = read_json(figures_file)
        set_adapter(run.model, run.folder(t) / "adapter", figures["adapter"])
        with run.timed(t, "measuring"):
            measured = measure(run, t)
        figures["tokens"]["measuring"] = run.drawn_tokens(t)["measuring"]
        records.append({"iteration": t, **measured, **figures, "seconds": run.seconds(t)})
        run.write(file, json.dumps(records, indent=1) + "\n")
        if rank() == 0:
            notes = report(run.out)  # after each iteration, for those who watch
        print(f"M_{t}: " + ", ".join(f"{name} {value}" for name, value in figure_rows(records[-1:]) if name in GLANCE))
        for line in drifts(records[-1], run.settings.max_score):
            print(f"Drift, {line}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return records


GLANCE = ("actor: true score", "actor: characters per answer", "judge: mean score", "judge: right about the truth")


def table(records):
    """The run at a glance, one column per model, for the screen."""
    lines = [f"{name:38}" + "".join(f"{value:>8}" for value in values)
             for name, *values in [["", *(f"M_{record['iteration']}" for record in records)], *figure_rows(records)]]
    dropped = Counter()
    for record in records:
        dropped.update(record["pairs"]["dropped"])
    return "\n".join([*lines, "dropped: " + ("; ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "nothing")])


UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


def goes_on(argv):
    """What a run that stopped says last: the command that goes on."""
    program = ["python"] if world() == 1 else ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    again = shlex.join([*program, *(sys.argv if argv is None else ["metareward.py", *map(str, argv)])])
    same = "same command" + (", on each machine," if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else "")
    return f"what was finished is kept, and the {same} goes on where this one was: {again}"


def join_processes():
    """Under torchrun, work together with the other processes it has started; only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")


def main(argv=None):
    only_plan = False
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # what a scheduler sends is Ctrl-C
            signal.signal(number, signal.default_int_handler)
        join_processes()
        settings, only_plan = parse_settings(argv)
        if only_plan and world() > 1:
            raise ValueError("--plan measures one process: python metareward.py --plan")
        if only_plan:
            return plan(settings)
        run = Run(settings)
        print(table(loop(run)))
        if world() > 1:
            torch.distributed.destroy_process_group()
        print(f"Read {settings.out}/report.html, or ask the model: python sampling.py {settings.out}/iter{settings.iters} \"How do I ...?\"")
    except KeyboardInterrupt:
        if rank() < 2:  # the second as well, for it may be the first that died
            print("\nstopped" + ("" if only_plan else f"; {goes_on(argv)}"), file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        where = f" in process {rank()}" if rank() > 0 else ""
        number = getattr(error, "errno", None) or next(map(int, re.findall(r"os error (\d+)", str(error))), None)  # as safetensors says it
        advice = f"; make room, or allow it to be written; {goes_on(argv)}" if number in UNWRITABLE and not only_plan else ""
        print(f"error{where}: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if world() == 1 or not re.search("peer|pipe|connection|remote process", str(error), re.IGNORECASE):
            raise
        print(f"error: another process of this run has ended: if it says why, see to that first; {goes_on(argv)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
