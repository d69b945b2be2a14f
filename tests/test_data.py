"""Stage 1: its filters, draws and voices, and the data set it wrote."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import test_evaluation
import torch
from conftest import SENTENCES, stage
from transformers import AutoModelForCausalLM

import common

synthesize = stage("01_synthesize")


# ---------------------------------------------------------------------------------------------------- filters
@pytest.mark.parametrize("text, good", [
    ("What is the capital of France?", True), ("It's \"fine\", I think: 20% off!", True),
    ("Look at www.site.org", False),
    ("print(x) and foo()", False), ("first\nsecond", False),
    ("Call 5551234 now", False), ("* a list", False), ("Is São Paulo – or “Nîmes” – large?", True),
    ("¿Qué hora es?", False), ("...", False), ("", False), ("use camelCase here", False)])
def test_speakable(text, good):
    assert synthesize.is_speakable(text) == good


@pytest.mark.parametrize("task, text, ended, failed", [
    ("instruct", "Tell me a story about a dog.", True, ""),
    ("instruct", "Tell me a story about a dog.", False, "ended"),
    ("instruct", "Tell me", True, "length"), ("instruct", "the dog " * 11, True, "length"),
    ("sqa", "Who was the first king", True, "form"),
    ("s2tt", "i am going home.", True, "form"), ("s2tt", "I am going home.", True, "")])
def test_the_first_filter_that_drops_an_instruction(task, text, ended, failed):
    assert synthesize.check_instruction(task, text.strip(), ended) == failed


@pytest.mark.parametrize("task, answer, ended, failed", [
    ("sqa", "Paris", True, ""), ("sqa", "The city of light, Paris", True, ""),
    ("sqa", "France", True, "answer words"), ("sqa", "Lyon", True, "answer otherwise"),
    ("sqa", "The answer", True, "answer otherwise"),
    ("sqa", "It is the old city of Paris", True, "answer words"), ("sqa", "", True, "answer ended"),
    ("sqa", "Paris", False, "answer ended"), ("instruct", "It is Paris, as everybody knows.", True, ""),
    ("instruct", "1. **Paris**", True, "answer speakable"),
    ("instruct", "I'm sorry, as a voice assistant I can't.", True, "answer declines"),
    ("instruct", "Any museum has assistants who help.", True, ""),
    ("s2tt", "Où est la capitale\n?", True, "answer speakable"),
    ("s2tt", "Où est « la capitale » ?", True, "")])
def test_the_first_filter_that_drops_an_answer(task, answer, ended, failed):
    opening = "Paris is the city of light, Paris." + synthesize.SHORT_ANSWER
    row = dict(task=task, text="What is the capital of France?", opening=opening, response=answer)
    assert synthesize.check_answer(row, ended) == failed


def test_an_sqa_answer_has_one_form():
    replies = ('mount Everest."', ' Mount Everest" is it', "Mount Everest")
    forms = list(map(synthesize.short_answer, replies))
    assert forms == [("Mount Everest", True), ("Mount Everest", True), ("Mount Everest", False)]


def test_an_sqa_answer_is_what_the_teacher_says_in_a_sentence():
    """The embedded teacher, really asked; transformers' own greedy sentence opens the answer."""
    teacher = synthesize.load_teacher("smollm2-135m", "cpu")
    row = dict(task="sqa", text="What is the capital of France?", opening="", response="", dropped="")
    synthesize.answer_instructions(teacher, "sqa", [row], SimpleNamespace(language="French", max_new=48))
    assert (row["response"], row["dropped"]) == ("Paris", "")
    llm = AutoModelForCausalLM.from_pretrained(common.resolve("smollm2-135m"), dtype=common.native_dtype())
    chat = [dict(role="system", content=common.SYSTEM), dict(role="user", content=row["text"])]
    ids = teacher.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                                return_dict=True)
    said = llm.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1]:]
    sentence = teacher.tokenizer.decode(said, skip_special_tokens=True)
    assert row["opening"] == sentence.strip() + synthesize.SHORT_ANSWER


def test_two_wordings_are_one_instruction():
    words = synthesize.content_words
    assert words("What is the capital of Peru?") == words("Tell me: the capital of Peru.") != words("Peru?")
    assert words("What is it?") == words("what is IT") != words("What are you?")    # common words alone


# ------------------------------------------------------------------------------------------- draws and groups
COUNTS = {split: {"instruct": 20, "sqa": 10, "s2tt": 0} for split in common.SPLITS}


def some_rows():
    rows = []
    for number in range(200):
        for task in ("instruct", "sqa"):
            dropped = "" if number % 3 else "length"
            rows.append(dict(id=f"{task}-{number}", task=task, text=str(number), dropped=dropped))
    return rows


def test_a_group_is_in_one_split_and_any_prefix_is_a_mixture():
    splits = synthesize.assign_splits(some_rows(), COUNTS, 0)
    assert splits == synthesize.assign_splits(some_rows(), COUNTS, 0)
    assert splits != synthesize.assign_splits(some_rows(), COUNTS, 1)
    ids = [row["id"] for rows in splits.values() for row in rows]
    assert len(ids) == len(set(ids)) == 3 * (20 + 10)
    for rows in splits.values():
        assert {row["task"] for row in rows[:12]} == {"instruct", "sqa"}
        assert not any(row["dropped"] for row in rows)


def test_voices_of_a_group_differ_and_unheard_ones_are_in_test_alone():
    voices, unheard, shares = list("abcdef"), list("XYZ"), []
    for seed in range(300):
        train = synthesize.choose_voices(voices, unheard, "train", "instruct", 4, seed)
        test = synthesize.choose_voices(voices, unheard, "test", "s2tt", 4, seed)
        assert len(set(train)) == len(set(test)) == 4 and set(train) <= set(voices)
        assert len(set(test) & set(unheard)) == 2
        assert train == synthesize.choose_voices(voices, unheard, "train", "instruct", 4, seed)
        assert len(set(synthesize.choose_voices(voices, ["X"], "test", "s2tt", 4, seed)) & {"X"}) == 1
        [one] = synthesize.choose_voices(voices, unheard, "test", "sqa", 4, seed)
        shares.append(one in unheard)
        assert synthesize.choose_voices(voices, unheard, "valid", "sqa", 4, seed)[0] in voices
    assert 0.4 < np.mean(shares) < 0.6


def test_deliveries_differ_with_the_seed_and_test_is_clean():
    conditions, drawn, amounts, fillers = "babble:4-14,clean,noise:-5-0", [], {}, 0
    for seed in range(300):
        item = dict(seed=seed, text=SENTENCES[1], split="train", voice="piper-joe")
        drawn.append(synthesize.draw_delivery(item, conditions))
        assert drawn[-1] == synthesize.draw_delivery(item, conditions)
        assert synthesize.draw_delivery(item | {"split": "test"}, conditions)["condition"] == "clean"
    for delivery in drawn:
        assert 0.85 <= delivery["speed"] <= 1.25 and 0.89 <= delivery["pitch"] <= 1.123
        fillers += delivery["spoken"] != SENTENCES[1]
        kind, amount = common.parse_condition(delivery["condition"])
        amounts.setdefault(kind, []).append(amount)
    assert len({(d["speed"], d["pitch"]) for d in drawn}) > 290 and 30 < fillers < 90
    assert min(map(len, amounts.values())) > 70 and set(amounts["clean"]) == {0}
    assert 4 <= min(amounts["babble"]) < 6 < 12 < max(amounts["babble"]) <= 14
    assert -5 <= min(amounts["noise"]) < -3 < -1 < max(amounts["noise"]) <= 0


def test_one_gross_failure_drops_its_group():
    items = []
    for group, seconds, wer in (("long", 9.1, 0.1), ("wrong", 2.0, 0.51), ("good", 9.0, 0.5)):
        for own in ((2.0, 0.0), (seconds, wer)):
            items.append(dict(group=group, voice="v", seconds=own[0], wer=own[1]))
    items.append(dict(group="of another language", voice="recording", seconds=2.0, wer=1.0))
    assert synthesize.failed_groups(items, 9.0) == {"long": "too long to hear", "wrong": "gross WER"}


def test_the_card():
    items = []
    for group, transcripts in enumerate((("Go home.", "go home"), ("Go home.", "go Rome"), ("Yes.", "yes"))):
        for s, transcript in enumerate(transcripts):
            items.append(dict(id=f"{group}-{s}", group=f"{group}", split="train", task="instruct", text="x",
                              response="y", voice=f"voice-{s}", seconds=600.0, transcript=transcript,
                              wer=0.25 * s))
    rows = [dict(task="instruct", dropped=""), dict(task="sqa", dropped="gross WER")]
    args = SimpleNamespace(preset="tiny", seed=0, teacher="t", s2tt="none")
    card = synthesize.data_card(dict(train=items, valid=[], test=[]), rows * 2, args)
    assert "| train | instruct | 3 | 6 | 1.000 | 0.125 | 67% |" in card   # two of three groups heard alike
    assert "| gross WER | 0 | 2 | 0 |" in card and "| none, needed or not | 2 | 0 | 0 |" in card
    assert card.count("x → y") == 6 and "by a person.\n" in card
    args.s2tt = "mustc:DIR"
    card = synthesize.data_card(dict(train=items, valid=[], test=[]), rows, args)
    assert "but what `mustc:DIR` holds" in card


@pytest.mark.parametrize("good", ["6", ""])
def test_text_batches_are_kept_and_a_hopeless_teacher_is_given_up(good, tmp_path, monkeypatch):
    def write_instructions(teacher, task, batch, args):
        written.append(batch)
        rows = [dict(text=f"{batch} {n}", dropped="length" if n > good else "") for n in "567"]
        return rows + [dict(text=f"The {batch} is 5", dropped="")] * (good > "")
    written, args = [], SimpleNamespace(work=tmp_path, teacher="gpt2", device="cpu")
    monkeypatch.setattr(synthesize, "load_teacher", lambda name, device: None)
    monkeypatch.setattr(synthesize, "write_instructions", write_instructions)
    monkeypatch.setattr(synthesize, "answer_instructions", lambda *_: None)
    if not good:
        with pytest.raises(common.UserError, match="sqa: 21 batches hold 0 turns"):
            synthesize.write_texts("sqa", 5, set(), args)
        return
    for wanted in (5, 5, 7):                              # two good rows and a duplicate in each batch
        rows = synthesize.write_texts("sqa", wanted, known := set(), args)
        assert [row["dropped"] for row in rows[:4]] == ["", "", "length", "duplicate"]
        assert len(rows) == 4 * ((wanted + 1) // 2)
    assert written == [0, 1, 2, 3]                        # what was kept is not written again
    rows = synthesize.write_texts("instruct", 2, known, args)              # words known from another task
    assert [row["dropped"] for row in rows[:2]] == ["duplicate"] * 2


def test_each_process_writes_one_text_batch_in_turn(tmp_path, monkeypatch):
    written, args = [], SimpleNamespace(work=tmp_path, teacher="t", device="cpu")
    monkeypatch.setattr(synthesize, "load_teacher", lambda name, device: None)
    monkeypatch.setattr(synthesize, "answer_instructions", lambda *_: None)
    monkeypatch.setattr(common, "world", lambda: 2)
    monkeypatch.setattr(common, "gather", lambda mine: [*mine, the_others(*mine)])

    def write_instructions(teacher, task, batch, args):
        written.append(batch)
        return [dict(text=str(batch))]

    def the_others(rows):
        return [dict(text=str(int(rows[0]["text"]) + 1))]
    monkeypatch.setattr(synthesize, "write_instructions", write_instructions)
    batches = synthesize.text_batches("sqa", args)
    texts = [next(batches)[0]["text"] for _ in range(4)]
    assert texts == ["0", "1", "2", "3"] and written == [0, 2]


def test_the_request_to_a_served_teacher(monkeypatch):
    def call(self, route, pick, **body):
        assert route == "completions"
        bodies.append(body)
        return pick({"choices": [{"text": " words", "finish_reason": "stop" if body["seed"] else "length"}]})
    bodies = []
    monkeypatch.setattr(common.Served, "call", call)
    teacher = synthesize.ServedTeacher(f"http://localhost:1/v1#{common.resolve('smollm2-135m')}")
    before, _, end_id = common.chat_parts(teacher.tokenizer, system=None)
    assert teacher.write(before, end_id, 9, [5, 6], 0.9) == [(" words", True)] * 2
    assert teacher.answer([before, before[1:]], end_id, 9) == [(" words", False)] * 2
    assert [body["temperature"] for body in bodies] == [1, 1, 0, 0]
    assert {body["seed"] for body in bodies[:2]} == {5, 6} and bodies[0]["top_p"] == 0.9
    prompts = sorted(len(body["prompt"]) for body in bodies)
    assert prompts == [len(before) - 1, len(before), len(before), len(before)]
    assert bodies[0]["stop"] == ["<|im_end|>"] and bodies[0]["prompt"] == before
    assert teacher.tokenizer.decode(before).endswith("<|im_start|>user\n")


def test_the_name_of_a_servers_only_model_is_kept(monkeypatch, tmp_path):
    def record_config(path, config):
        raise common.UserError(config["teacher"])         # nothing is written
    monkeypatch.setattr(common.Served, "call", lambda *_, **__: common.resolve("smollm2-135m"))
    monkeypatch.setattr(common, "record_config", record_config)
    for address in ("http://localhost:1/v1", "http://localhost:1/v1#" + common.resolve("smollm2-135m")):
        flags = ["--work", str(tmp_path / "work"), "--teacher", address]
        monkeypatch.setattr(sys, "argv", ["01_synthesize.py", *flags])
        with pytest.raises(common.UserError, match=common.resolve("smollm2-135m") + "$"):
            synthesize.main()


@pytest.mark.parametrize("name, language", [
    ("covost2", "German"), ("mustc", "French"), ("fleurs", "Chinese")])
def test_s2tt_on_recordings(name, language, tmp_path, waves, monkeypatch):
    """A training split as published: transcripts are answered by the teacher, translations stay unread; no
    voice is needed."""
    spec, expected, _ = getattr(test_evaluation, name)(tmp_path, waves)
    wanted = len({text for _, text, _ in expected})
    monkeypatch.setattr(synthesize, "check_answer", lambda *_: "")         # this teacher can't translate
    monkeypatch.setitem(common.PRESETS["tiny"], "voices", "gone.onnx#0-7")
    flags = ["--train", f"s2tt={wanted}", "--valid", "s2tt=0", "--test", "s2tt=0", "--s2tt", spec]
    monkeypatch.setattr(sys, "argv", ["01_synthesize.py", "--work", str(tmp_path / "work"), *flags])
    synthesize.main()
    items = common.read_items(tmp_path / "work", "train")
    assert len(items) == 4 * len({item["group"] for item in items}) == 4 * wanted
    for item in items:
        assert item["language"] == language and item["prompt"] == f"Translate what I said into {language}."
        references = [reference for _, text, reference in expected if text == item["text"]]
        assert references and item["response"] and [item["response"]] not in references
        wave, whole = common.item_wave(tmp_path / "work" / "data", item), waves[
            SENTENCES.index(item["text"].strip('"'))]
        assert item["voice"] == "recording" and abs(len(wave) - len(whole)) <= 2400
    with pytest.raises(common.UserError, match="--s2tt covost2:x: not as published"):
        synthesize.recordings("covost2:x", 0)


def test_recordings_that_cannot_be_used(tmp_path, waves):
    """A table without rows; of four recordings in Chinese, one silent and one empty, two are left."""
    path, table = tmp_path / "covost_v2.zh_en.train.tsv", "path\tsentence\ttranslation\tclient_id\n"
    path.write_text(table)
    with pytest.raises(common.UserError, match="not as published"):
        synthesize.recordings(f"covost2:{path}", 0)
    (tmp_path / "clips").mkdir()
    path = path.with_name("covost_v2.zh-CN_en.train.tsv")
    for n, (text, wave) in enumerate((("我去商店", waves[2]), ("你好吗", 0 * waves[2]), ("再见", waves[2][:0]),
                                      ("早上好", waves[2]))):
        soundfile.write(tmp_path / "clips" / f"{n}.wav", wave.numpy(), common.RATE)
        table += f"{n}.wav\t{text}\tx\ta\n"
    path.write_text(table)
    args = SimpleNamespace(s2tt=f"covost2:{path}", seed=0, max_seconds=9.0)
    rows = synthesize.recorded_instructions(0, args)
    kept = [row["text"] for row in rows if not row["dropped"]]
    assert sorted(kept) == ["我去商店", "早上好"] and len(set(map(synthesize.content_words, kept))) == 2
    assert [row["dropped"] for row in rows].count("no recording") == 2


# ----------------------------------------------------------------------------------------------------- voices
def multi_speaker(tmp_path, monkeypatch):
    """A Piper file of 904 speakers: the embedded voice, whose network's speaker ids are written down."""
    folder, inputs = common.resolve("piper-joe"), []
    config = json.loads(open(f"{folder}/voice.onnx.json").read()) | {"num_speakers": 904}
    path = tmp_path / "libritts.onnx"
    path.touch()
    (tmp_path / "libritts.onnx.json").write_text(json.dumps(config))
    real = synthesize.onnx_session(f"{folder}/voice.onnx")

    class Session:
        def run(self, names, values):
            inputs.append(values.pop("sid").tolist())
            return real.run(names, values)
    monkeypatch.setattr(synthesize, "onnx_session", lambda path: Session())
    return path, inputs


def test_speakers_of_one_piper_file(tmp_path, monkeypatch):
    path, inputs = multi_speaker(tmp_path, monkeypatch)
    names = synthesize.voice_names(f"{path}#898-903,{path}#7,piper-joe")
    assert names == [f"{path}#{speaker}" for speaker in (898, 899, 900, 901, 902, 903, 7)] + ["piper-joe"]
    items = [dict(voice=name, spoken=SENTENCES[0], speed=1.0, pitch=1.0) for name in (names[0], names[5])]
    waves = synthesize.speak(items)
    assert inputs == [[898], [903]] and min(map(len, waves)) > common.RATE
    with pytest.raises(common.UserError, match="PATH.onnx#0-903 of its 904 speakers"):
        synthesize.voice_names(f"{path}#900-904")
    assert synthesize.voice_names(f"{tmp_path},{path}") == [str(path)] * 2        # a folder


@pytest.mark.parametrize("spec", ["joe", "kokoro-jf_x", "no/such.onnx", "no/such.onnx#0-3", "v.onnx#amy"])
def test_a_voice_that_is_not_there_is_one_line(spec):
    with pytest.raises(common.UserError, match=f"voice {spec}"):
        synthesize.voice_names(spec)


@pytest.mark.parametrize("voices, unheard", [
    ("piper-joe,kokoro-jf_alpha", ""), ("piper-joe,piper-joe,kokoro-jf_alpha,kokoro-jm_kumo", ""),
    (common.PRESETS["tiny"]["voices"], "piper-joe")])
def test_too_few_voices(voices, unheard):
    args = SimpleNamespace(voices=voices, unheard_voices=unheard, voices_per_item=4)
    with pytest.raises(common.UserError, match="4 different ones"):
        synthesize.read_voices(args)


def test_voices_of_the_presets():
    voices, unheard = synthesize.read_voices(SimpleNamespace(**common.PRESETS["tiny"]))
    assert voices == ["piper-joe", "kokoro-jf_alpha", "kokoro-jf_tebukuro", "kokoro-jm_kumo"]
    assert unheard == ["kokoro-jf_gongitsune", "kokoro-jf_nezumi"]
    twice = {name: ",".join([common.PRESETS["tiny"][name]] * 2) for name in ("voices", "unheard_voices")}
    assert synthesize.read_voices(SimpleNamespace(voices_per_item=4, **twice)) == (voices, unheard)


def test_whisper_hears_what_the_voices_say():
    items = []
    for seed, voice in enumerate(["piper-joe", "kokoro-jf_alpha", "kokoro-jm_kumo"]):
        item = dict(seed=seed, text=SENTENCES[3], split="train", voice=voice)
        items.append(item | synthesize.draw_delivery(item, "clean"))
    waves = synthesize.speak(items)
    for wave, again in zip(waves, synthesize.speak(items, threads=2)):
        assert torch.equal(wave, again) and 0.85 < wave.abs().max() < 0.95 and 1 < len(wave) / common.RATE < 6
    asr = common.load_whisper("whisper-tiny.en")
    for heard in common.listen(asr, waves, 12.0):
        assert common.word_errors(SENTENCES[3], heard)[0] <= 2


def test_pitch_leaves_the_speed():
    voice = "kokoro-jf_alpha"                             # Piper rounds each phoneme up
    level = dict(voice=voice, spoken=SENTENCES[1], speed=1.0, pitch=1.0)
    one, two = synthesize.speak([level, level | {"pitch": 2 ** (2 / 12)}])
    assert len(two) / len(one) == pytest.approx(1, abs=0.03)

    def centre(wave):
        power = torch.fft.rfft(wave).abs() ** 2
        return float((power * torch.arange(len(power))).sum() / power.sum() / len(wave))
    assert centre(two) > 1.05 * centre(one)


# ------------------------------------------------------------------------------------------ the data it wrote
def test_the_data_set(work):
    config = json.loads((work / "data" / "config.json").read_text())["config"]
    texts, known = {}, set(synthesize.voice_names(config["voices"]))
    for split in common.SPLITS:
        items, groups = common.read_items(work, split), {}
        for item in items:
            groups.setdefault(item["group"], []).append(item)
        assert sum(groups.values(), []) == items          # those of a group are neighbours
        wanted = synthesize.parse_counts(config[split])
        for task, count in wanted.items():
            assert sum(own[0]["task"] == task for own in groups.values()) <= count
        for group, own in groups.items():
            check_group_of_data(work, split, group, own, config["voices_per_item"])
            texts.setdefault(common.normalise(own[0]["text"]), set()).add(split)
            if split != "test":
                assert {item["voice"] for item in own} <= known
    assert all(len(splits) == 1 for splits in texts.values())
    card = (work / "data" / "card.md").read_text()
    assert "| first filter failed |" in card and "groups whose transcripts agree" in card
    check_transcripts(common.read_jsonl(work / "data" / "batches" / "speech-0000.jsonl"), work / "data")


def check_transcripts(items, folder):
    """They are what Whisper makes of the files, which training reads, and not of what was written there."""
    waves = [common.item_wave(folder, item) for item in items]
    heard = common.listen(common.load_whisper("whisper-tiny.en"), waves, 12.0)
    assert heard == [item["transcript"] for item in items]


def check_group_of_data(work, split, group, own, voices_per_item):
    count = 1 if own[0]["task"] == "sqa" else voices_per_item
    assert len(own) == count == len({item["voice"] for item in own})
    assert len({(item["text"], item["prompt"], item["response"]) for item in own}) == 1
    for s, item in enumerate(own):
        assert item["id"] == f"{group}-{s}" and item["split"] == split
        assert item["reference"] == [item["response"]]
        assert item["prompt"] == common.REQUESTS[item["task"]].format(language=item["language"])
        wave, rate = soundfile.read(work / "data" / item["audio"])
        assert rate == common.RATE and len(wave) / rate == pytest.approx(item["seconds"], abs=1e-3)
        assert np.abs(wave).max() == pytest.approx(0.9, abs=1e-3) and item["wer"] <= 0.5
        assert item["task"] != "sqa" or len(item["response"].split()) <= 5
        assert split != "test" or item["condition"] == "clean"
        common.parse_condition(item["condition"])


def test_counts_are_read():
    counts = synthesize.parse_counts("instruct=24,sqa=8")
    assert counts == {"instruct": 24, "sqa": 8} and counts["s2tt"] == 0
    for text in ("instruct", "poems=3", "sqa=-1", ""):
        with pytest.raises(common.UserError, match="TASK=NUMBER"):
            synthesize.parse_counts(text)
