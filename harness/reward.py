"""A reward model in the judge's place: one number for a prompt and an answer."""
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from dpo import collect_shares, rank, share
from sampling import Chat, load_tokenizer

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # in one forward pass


class RewardModel:
    """A sequence classifier of one logit, such as most published reward models are.

    name: a hub name or a folder; safetensors only, no remote code. Raises ValueError for another
    kind of model. The chat template is the reward model's own.
    """

    def __init__(self, name, bits=None):
        self.chat = Chat(load_tokenizer(name))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=torch.float32 if bits == 32 else torch.bfloat16, device_map=device,
                use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--reward {name}: not a reward model ({error})") from None
        if self.model.config.num_labels != 1 or info["missing_keys"]:
            raise ValueError(f"--reward {name}: not a reward model, which has one trained logit")
        self.model.eval().requires_grad_(False)

    def token_ids(self, answer):
        """Token ids of a prompt with its answer."""
        return self.chat.prompt(answer["prompt"]) + self.chat.answer(answer["text"])

    @torch.no_grad()
    def scores(self, answers, label):
        """A score for each answer, a float. Only answers of the same length share a pass.

        So nothing is padded, and no model has to be told what padding is.
        """
        mine = share(answers)
        ids = [self.token_ids(answer) for answer in mine]
        scores = [None] * len(mine)
        with tqdm(total=len(mine), desc=label, unit="answer", disable=rank() > 0) as bar:
            for places in same_length(ids, BATCH_TOKENS[self.model.device.type]):
                batch = torch.tensor([ids[i] for i in places], device=self.model.device)
                logits = self.model(input_ids=batch, use_cache=False).logits[:, 0]  # (B,)
                for i, score in zip(places, logits.float().tolist()):
                    scores[i] = score
                bar.update(len(places))
        return collect_shares(scores)


def same_length(lists, most):
    """Indices of lists of the same length, in groups of at most `most` elements in all."""
    by_length = {}
    for i, one in enumerate(lists):
        by_length.setdefault(len(one), []).append(i)
    for length, places in sorted(by_length.items(), reverse=True):
        count = max(1, most // length)
        for start in range(0, len(places), count):
            yield places[start:start + count]
