"""A reward model in the judge's place: one number for a prompt and an answer."""
import itertools
import math

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from harness.engine.chat import Chat
from harness.engine.passes import blocks
from harness.engine.processes import collect_shares, share
from harness.loading import load_tokenizer

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # in one forward pass


class RewardModel:
    """A sequence classifier of one logit, such as most published reward models are.

    name: a hub name or a folder; safetensors only, no remote code. Raises ValueError for another
    kind of model, and for one that cannot score an answer. It is called as model cards do it: on
    its own chat template's whole rendering of question and answer.
    """

    def __init__(self, name, bits=None):
        self.chat = reward_chat(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=torch.float32 if bits == 32 else torch.bfloat16, device_map=device,
                use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--reward {name}: not a reward model ({error})") from None
        if self.model.config.num_labels != 1 or info["missing_keys"]:
            raise ValueError(f"--reward {name}: not a reward model, which is a sequence classifier "
                             "with one label (num_labels 1) and trained weights")
        self.model.eval().requires_grad_(False)
        config = self.model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or math.inf
        if config.pad_token_id is None:  # its class would refuse to score two answers at once
            config.pad_token_id = -1     # no token: the logit is the last one's, as for one answer
        self.try_it(name)

    def try_it(self, name):
        """Raise ValueError unless two answers of the same length get a number."""
        try:
            scores = self.logits([self.token_ids({"prompt": "What now?", "text": "Wait."})] * 2)
        except Exception as error:  # a forward pass may fail in many ways
            raise ValueError(f"--reward {name}: it cannot score an answer ({error})") from None
        if not all(map(math.isfinite, scores)):
            raise ValueError(f"--reward {name}: its score of an answer is no finite number: "
                             "choose another model, or other --bits")

    def token_ids(self, answer):
        """Token ids of a prompt with its answer."""
        return self.chat.chat(answer["prompt"], answer["text"])

    @torch.no_grad()
    def logits(self, ids):
        """A number for each of some lists of token ids that have the same length."""
        batch = torch.tensor(ids, device=self.model.device)
        return self.model(input_ids=batch, use_cache=False).logits[:, 0].float().tolist()

    def scores(self, answers, label):
        """A score for each answer, a float; None for one that is longer than the model's context.

        Only answers of the same length share a pass. So nothing is padded, and no model has to be
        told what padding is.
        """
        mine = share(answers)
        ids = [self.token_ids(answer) for answer in mine]
        scores = [None] * len(mine)
        with tqdm(total=len(mine), desc=label, unit="answer") as bar:
            for places in same_length(ids, BATCH_TOKENS[self.model.device.type]):
                if len(ids[places[0]]) <= self.context:
                    for i, score in zip(places, self.logits([ids[i] for i in places])):
                        scores[i] = score
                bar.update(len(places))
        return collect_shares(scores)


def reward_chat(name):
    """The Chat of a reward model. ValueError if there is none, by the flag's name."""
    try:
        return Chat(load_tokenizer(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"--reward {name}: {error}") from None


def same_length(lists, most):
    """Indices of lists of the same length, in groups of at most `most` elements in all."""
    longest_first = sorted(range(len(lists)), key=lambda i: -len(lists[i]))
    for length, places in itertools.groupby(longest_first, key=lambda i: len(lists[i])):
        yield from blocks(places, lambda _: length, most)
