"""What the four scripts write in one run at the smallest size (conftest.py), and every system's answer to a
recording."""
import json

import torch
from conftest import log_of, run_here

import common

NAMES = ("sft", "sft+", "kd", "rba-group", "rba-single")


def test_checkpoints_logs_and_plots(work):
    for name in NAMES:
        held = torch.load(work / f"{name}.pt", weights_only=True)
        assert held["format"] == common.CHECKPOINT and held["history"][-1]["seed"] == 0
        assert json.loads((work / f"{name}.config.json").read_text())["versions"]["torch"].startswith("2.11")
        rows = log_of(work, name)
        assert [row["step"] for row in rows if "loss" in row] == [1]
        assert [row["step"] for row in rows if "held_out/rewards" in row] == [0, 1]
        assert rows[0]["held_out/kl"] == 0 and len(rows[0]["held_out/rewards"]) == 2
        assert (work / "plots" / f"{name}.png").stat().st_size > 5000
    sft, rba = (torch.load(work / f"{name}.pt", weights_only=True)["state"] for name in ("sft", "rba-single"))
    for part in ("lora_A", "lora_B"):
        assert any(part in name and not torch.equal(sft[name], rba[name]) for name in sft), part
    history = torch.load(work / "rba-group.pt", weights_only=True)["history"]
    assert [past["objective"] for past in history] == ["sft", "rba-group"]


def test_samples_can_be_read(work):
    items = {item["id"]: item for item in common.read_items(work, "train")}
    for name in ("rba-group", "rba-single"):
        rows = common.read_jsonl(work / "samples" / f"{name}.jsonl")
        assert {row["group"] for row in rows} <= {item["group"] for item in items.values()} and len(rows) > 4
        for row in rows:
            assert row["text"] == items[row["id"]]["text"] and row["role"] in ("positive", "negative", "")
            assert row["logp_answer"] < 0 and row["logp_y_ref"] < 0 and bool(row["role"]) != bool(row["why"])
    [start] = [row for row in log_of(work, "rba-group") if "sampled" in row]
    assert {f"samples/reward/{row['voice']}" for row in rows} <= start.keys()
    assert start["samples/tokens"] > 0 and 0 <= start["samples/in_a_pair"] <= 1


def test_the_data_stay_between_the_stages(work, tmp_path):
    """Preset, teacher and language are the data's: 02 to 04 need no flag that 01 was given."""
    args = common.parse_args("", {}, ["--work", str(work)])
    assert (args.preset, args.teacher, args.work) == ("tiny", "smollm2-135m", work)
    config = dict(preset="small", teacher="t", served=True, language="Spanish")
    common.write_json(tmp_path / "data" / "config.json", {"config": config})
    args = common.parse_args("", {}, ["--work", str(tmp_path)])
    assert {key: getattr(args, key) for key in config} == config and args.held_out == 128


def test_ask_prints_every_systems_answer(work, model):
    question = work / "data" / common.read_items(work, "test")[0]["audio"]
    out = run_here(model, "04_evaluate.py", work, "--ask", question)
    assert all(f"{name} |" in out for name in ("base", *NAMES))
