"""It learns: the real loops of 02 and 03 on four instructions in four voices, in the precision users run."""
import json
import shutil
import sys

import pytest
import torch
from conftest import TAUGHT, stage

import common

pytestmark = pytest.mark.learns
rba = stage("03_rba_rl")


@pytest.fixture
def work(groups, tmp_path):
    shutil.copytree(groups, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def train(work, model, monkeypatch):
    """A stage's own main() in this process, on the model already loaded; -> its log and checkpoint."""
    monkeypatch.setattr(common, "load_speechlm", lambda *_: model)
    monkeypatch.setitem(common.PRESETS, "tiny", common.PRESETS["tiny"] | dict(max_new=16, held_out=4))

    def run(script, name, *flags):
        monkeypatch.setattr(sys, "argv", [script, "--work", str(work), "--out", name, *map(str, flags)])
        stage(script).main()
        rows = [json.loads(line) for line in (work / "logs" / f"{name}.jsonl").read_text().splitlines()]
        return rows, torch.load(work / f"{name}.pt", weights_only=True)["state"]
    yield run
    model.set_state(model.initial)


def heard(work, model):
    items = common.read_items(work, "train")
    return items, common.listen_to_split(model, work, "train", items, window=12.0)


def greedy(work, model, path):
    """Greedy answers of a checkpoint to the 16 utterances, as 04 gives them."""
    model.load(path)
    items, sounds = heard(work, model)
    return items, [answer.text for answer in model.answer(sounds, [""] * len(items), 16)]


def curve(rows, name):
    return [row[name] for row in rows if name in row]


def test_sft_learns_four_instructions(train, work, model):
    rows, state = train("02_sft_warmup", "sft", "--objective", "sft", "--max-steps", 16,
                        "--batch-size", 4, "--lr", 1e-3)
    loss = curve(rows, "loss")
    assert loss[-1] < loss[0] / 10, loss
    assert all(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name)
    assert curve(rows, "held_out/kl")[-1] > 1             # log pi_theta - log pi_ref of its own samples
    items, answers = greedy(work, model, work / "sft.pt")
    assert sum(answer == item["response"] for item, answer in zip(items, answers)) >= 14


def test_rba_single_learns_from_base(train, work, model):
    rows, _ = train("03_rba_rl", "single", "--objective", "rba-single", "--init", "none", "--max-steps", 10,
                    "--batch-size", 4, "--lr", 5e-4)
    assert curve(rows, "rewards/accuracies")[-1] > 0.95
    assert curve(rows, "held_out/logps_y_ref")[-1] > curve(rows, "held_out/logps_y_ref")[0] + 5
    reward = curve(rows, "held_out/reward_greedy")
    assert reward[-1] > reward[0] + 0.1, reward


def words(items, answers):
    """A reward that can be read off: the fewer words the better."""
    return [-float(len(answer.split())) for answer in answers]


GROUP = ("--objective", "rba-group", "--init", "none", "--batch-size", 4, "--max-steps", 12, "--rounds", 3,
         "--lr", 1e-3, "--lambda-ce", 0, "--temperature", 1)


def test_rba_group_moves_the_greedy_answers_where_the_reward_points(train, monkeypatch):
    """Answers of fourteen words lose more than five; with rewards shuffled within groups less than a third of
    that."""
    monkeypatch.setattr(common, "Reward", lambda *_: words)
    monkeypatch.setitem(common.PRESETS["tiny"], "max_new", 24)
    gains = {}
    for name, flags in (("shorter", ()), ("shuffled", ("--control", "shuffled"))):
        reward = curve(train("03_rba_rl", name, *GROUP, *flags)[0], "held_out/reward_greedy")
        gains[name] = reward[-1] - reward[0]
    assert gains["shorter"] > 5 and gains["shuffled"] < gains["shorter"] / 3, gains


def test_learning_rate_zero_changes_nothing(train, work, model):
    rows, state = train("03_rba_rl", "zero", "--objective", "rba-single", "--init", "none", "--max-steps", 2,
                        "--batch-size", 4, "--lr", 0)
    assert all(torch.equal(value, model.initial[name]) for name, value in state.items())
    assert len({tuple(rewards) for rewards in curve(rows, "held_out/rewards")}) == 1


def test_the_answers_are_short_enough(model):
    assert max(len(model.answer_ids(response)) for _, response in TAUGHT) <= 16
