"""harness/views/card.py: an adapter's card has a head that hubs read, and what the run knows."""
import dataclasses

import pytest
import yaml

from harness.settings import Settings
from harness.views.card import write_card

RECORDS = [{"iteration": t, "actor": {"truth": 2.5 + t, "mean_length": 100},
            "judge": {"ties": 0.25}, "meta_judge": None, "pairs": {"actor": 10 * t, "judge": 0}}
           for t in range(3)]


def card(folder, model, records=RECORDS, **settings):
    """(the head, the rest) of a card."""
    write_card(folder, Settings(model=str(model), bits=32, **settings), records)
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_the_model_is_and_how_it_was_made(tmp_path):
    head, text = card(tmp_path, "somebody/model")
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation",
                    "tags": ["lora", "meta-rewarding"], "base_model": "somebody/model",
                    "base_model_relation": "adapter"}
    assert "# M_2 of Meta-Rewarding on somebody/model\n" in text
    assert "The base's own page says under which licence it stands." in text
    assert ("iterations: 2, prompts in each: 5000, answers to each: 7, temperature 0.8, top-p 0.95"
            in text)
    assert "judgments of each answer, by the model itself: 11\n" in text
    assert "from the first, with pairs of judgments by the model as meta-judge: 2\n" in text
    assert "rho in each iteration: 0 0.32\n- DPO with beta 0.1, learning rate 5e-05" in text
    assert "|  | M_0 | M_1 | M_2 |\n| --- | --- | --- | --- |\n" in text
    assert "| actor: true score | 2.50 | 3.50 | 4.50 |\n" in text


@pytest.mark.parametrize("readme, licence", [
    ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\nlicense: mit\n", "apache-2.0"),
    ("---\nlanguage: en\n---\nlicense: mit\n---\n", None), ("license: mit\n", None),
    (b"---\nlicense: \xff\n---\n", None)])
def test_the_licence_is_the_one_that_the_head_of_the_base_s_card_names(tmp_path, readme, licence):
    """A folder is no name that a hub takes for a base, and the path of somebody's disk is nobody's
    business.
    """
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    head, text = card(adapter, base)
    assert head.get("license") == licence and "base_model" not in head
    assert f"licence is {licence or 'not known'}." in text
    assert "Meta-Rewarding on base\n" in text and str(tmp_path) not in text


def test_what_was_not_done_is_not_told(tmp_path):
    """The warm start alone; answers scored by their truth; and the same bytes each time, whatever
    may change when a run goes on.
    """
    _, text = card(tmp_path, "tiny", RECORDS[:1])
    assert "warm start on judgments of ranked replies, epochs: 3\n" in text
    assert "DPO" not in text and "M_1" not in text
    head, text = card(tmp_path, "tiny", no_meta_judge=True)
    assert "# M_2 of Self-Rewarding on tiny\n" in text
    assert head["tags"] == ["lora", "self-rewarding"]
    assert "# M_2 of Self-Rewarding on tiny\n" in card(tmp_path, "tiny", judge_iters=0)[1]
    _, text = card(tmp_path, "tiny", reward="checks")
    assert "# M_2 of Iterative DPO on tiny\n" in text
    assert "scored by their truth" in text and "warm start" not in text and "judgments" not in text
    before = (tmp_path / "README.md").read_bytes()
    write_card(tmp_path, dataclasses.replace(Settings(model="tiny", bits=32, reward="checks"),
                                             iters=9, out="elsewhere"), RECORDS)
    assert (tmp_path / "README.md").read_bytes() == before
