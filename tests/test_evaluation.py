"""04 on public sets, each written here in its published format, and its statistics against independent references."""
import json
import sys

import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from conftest import SENTENCES, stage

import common

evaluate = stage("04_evaluate")
FRANCE, CHICKEN, STORE, MOON = SENTENCES


def record(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave.numpy(), common.RATE)
    return path.name


# ------------------------------------------------------------------------------------------------------ public sets
def llama_questions(folder, waves):
    """CRLF, trailing spaces, one recording missing."""
    (folder / "llama_questions_300.tsv").write_bytes(("Questions\tAnswer\tWav Filename\r\n"
                                                      f"{FRANCE} \tParis \t{record(folder / 'q1.wav', waves[0])} \r\n"
                                                      f"{MOON}\tNeil Armstrong\tgone.wav\r\n").encode())
    return f"llama_questions:{folder}", [("sqa", FRANCE, ["Paris"])], ["gone.wav"]


def openaudiobench(folder, waves):
    """A comma, quotes and a line break in cells; several answers as a Python list, one of them without words."""
    folder = folder / "eval_datas" / "trivia_qa"
    record(folder / "audios" / "a.wav", waves[0])
    record(folder / "audios" / "b.wav", waves[3])
    (folder / "trivia_qa.csv").write_text('question,answer_normalized_aliases,answer_normalized_value,audio_filename\n'
                                          f'"{FRANCE}","[\'paris\', ""paris\'s city""]",paris,a.wav\n"{MOON}\n","neil armstrong, armstrong",neil,b.wav\n'
                                          'What is it?,"[\'it\']",it,c.wav\nNobody knows?,[],,a.wav\n')
    return f"openaudiobench:{folder}", [("sqa", FRANCE, ["paris", "paris's city", "paris"]), ("sqa", MOON, ["neil armstrong", "armstrong", "neil"])], [
        "c.wav", "a.wav#2"]


def subset(folder, name, wave, table):
    """Another subset of OpenAudioBench, of one recording."""
    folder = folder / "eval_datas" / name
    record(folder / "audios" / "a.wav", wave)
    (folder / f"{name}.csv").write_text(table)
    return f"openaudiobench:{folder}"


def alpaca_eval(folder, waves):
    spec = subset(folder, "alpaca_eval", waves[1], f'instruction,output,audio_filename\n"{CHICKEN}","[Your Name] Grill it.",a.wav\n')
    return spec, [("instruct", CHICKEN, ["[Your Name] Grill it."])], []


def web_questions(folder, waves):
    spec = subset(folder, "web_questions", waves[0], f"question,answers,audio_filename\n{FRANCE},\"['Paris', 'Paris, France']\",a.wav\n"
                  f'{FRANCE},"Paris;Paris, France",a.wav\n')
    return spec, [("sqa", FRANCE, ["Paris", "Paris, France"])] * 2, []


def llama_questions_of_openaudiobench(folder, waves):
    spec = subset(folder, "llama_questions", waves[0], f"Questions,Answer,audio_filename\n{FRANCE},Paris,a.wav\n")
    return spec, [("sqa", FRANCE, ["Paris"])], []


def voicebench(folder, waves):
    """Without a reference (for a judge), with one, with several, with a number; a file that is no audio, rows without words."""
    rows = [dict(audio=record(folder / f"{i}.wav", waves[i]), prompt=SENTENCES[i]) for i in (1, 0, 3, 2)]
    rows[1]["reference"], rows[2]["reference"], rows[3]["reference"] = "Paris", ["Neil Armstrong", "Armstrong"], 1969
    (folder / "broken.wav").write_text("no audio")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    lost = [dict(audio="broken.wav", prompt="Hello?"), dict(audio="0.wav"), dict(audio="0.wav", prompt="\ud800", reference="x"),
            dict(audio="loop.wav", prompt="Hello?"), dict(audio="gone.wav", prompt="Hello?", id="\ud800")]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *lost]))
    return f"voicebench:{folder / 'set.jsonl'}", [("instruct", CHICKEN, []), ("sqa", FRANCE, ["Paris"]), (
        "sqa", MOON, ["Neil Armstrong", "Armstrong"]), ("sqa", STORE, ["1969"])], ["00004", "00005", "00006", "00007", "?"]


def covost2(folder, waves):
    """Quotes are text, a backslash escapes; recordings are mp3."""
    (folder / "clips").mkdir()
    soundfile.write(folder / "clips" / "common_voice_en_1.mp3", waves[2].numpy(), common.RATE)
    (folder / "covost_v2.en_de.test.tsv").write_text('path\tsentence\ttranslation\tclient_id\n'
                                                     f'common_voice_en_1.mp3\t"{STORE}\t"Ich gehe\\\tin den Laden.\tabc\n'
                                                     'common_voice_en_2.mp3\tGone.\tWeg.\tabc\n')
    return f"covost2:{folder / 'covost_v2.en_de.test.tsv'}", [("s2tt", '"' + STORE, ['"Ich gehe\tin den Laden.'])], ["common_voice_en_2.mp3"]


def mustc(folder, waves):
    """Segments of one long recording, by offset and duration, line by line with the texts; a line separator that ends no line."""
    folder = folder / "en-fr" / "data" / "tst-COMMON"
    import torch
    gap, at = torch.zeros(common.RATE), [0.0, (len(waves[0]) / common.RATE) + 1]
    record(folder / "wav" / "ted_1.wav", torch.cat([waves[0], gap, waves[2]]))
    (folder / "txt").mkdir()
    durations = [len(wave) / common.RATE for wave in (waves[0], waves[2])]
    (folder / "txt" / "tst-COMMON.yaml").write_text("".join(
        f"- {{duration: {d:.6f}, offset: {o:.6f}, rW: 3, uW: 0, speaker_id: spk.1, wav: ted_1.wav}}\n" for d, o in zip(durations, at)))
    (folder / "txt" / "tst-COMMON.en").write_text(f"{FRANCE}\n{STORE}\n")
    (folder / "txt" / "tst-COMMON.fr").write_text("Quelle\u2028capitale ?\nJe vais au magasin.\n")
    return f"mustc:{folder}", [("s2tt", FRANCE, ["Quelle\u2028capitale ?"]), ("s2tt", STORE, ["Je vais au magasin."])], []


def fleurs(folder, waves):
    """No header; two speakers share an id; quotes are text."""
    for name in ("7.wav", "8.wav"):
        record(folder / "en_us" / "audio" / "test" / name, waves[2])
    row = "\t".join(["{id}", "{file}", "{text}", "x", "x|", "100", "MALE"]) + "\n"
    (folder / "en_us" / "test.tsv").write_text(row.format(id=5, file="7.wav", text=STORE) + row.format(id=5, file="8.wav", text=STORE)
                                               + row.format(id=6, file="7.wav", text=STORE))
    (folder / "cmn_hans_cn").mkdir()
    (folder / "cmn_hans_cn" / "test.tsv").write_text(row.format(id=5, file="1.wav", text='我"要去商店。') * 2)
    return f"fleurs:{folder / 'en_us' / 'test.tsv'}:cmn_hans_cn", [("s2tt", STORE, ['我"要去商店。'])] * 2, ["6-7.wav"]


def ours(folder, waves):
    rows = [dict(id="a", audio=record(folder / "a.wav", waves[0]), task="sqa", instruction=FRANCE, reference="Paris"),
            dict(id="b", audio="a.wav", task="instruct", text=FRANCE, reference=["Paris.", "It is Paris."]),
            dict(id="c", audio="a.wav", task="s2tt", text=FRANCE, reference="法国的首都是哪里？", language="zh")]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "mine.jsonl"), [("sqa", FRANCE, ["Paris"]), ("instruct", FRANCE, ["Paris.", "It is Paris."]),
                                        ("s2tt", FRANCE, ["法国的首都是哪里？"])], []


SETS = (llama_questions, openaudiobench, alpaca_eval, web_questions, llama_questions_of_openaudiobench, voicebench, covost2, mustc, fleurs, ours)


@pytest.mark.parametrize("write", SETS, ids=lambda write: write.__name__)
def test_a_set_is_read_as_published(write, tmp_path, waves):
    spec, expected, lost = write(tmp_path, waves)
    source, folder, items, broken = common.read_set(spec, "French")
    good = [item for item in items if item["id"] not in broken]
    assert [(item["task"], item["text"], item["reference"]) for item in good] == expected
    assert len(items) == len(expected) + len(lost) and len({item["id"] for item in items}) == len(items)
    assert [any(name in known for known in broken) for name in lost] == [True] * len(lost) and len(broken) == len(lost)
    assert source.is_file()
    for item in good:                                     # the very samples: of a long recording, the segment
        wave = common.item_wave(folder, item)
        whole = waves[SENTENCES.index(item["text"].strip('"'))]
        assert abs(len(wave) - len(whole)) <= (2400 if item["audio"].endswith("mp3") else 2)
    languages = {item["language"] for item in items if item["task"] == "s2tt"}
    assert languages == {covost2: {"German"}, mustc: {"French"}, fleurs: {"Chinese"}, ours: {"Chinese"}}.get(write, set())
    for item in items:
        assert item["prompt"] == {"instruct": "", "sqa": "Answer in one short sentence.",
                                  "s2tt": f"Translate what I said into {item['language']}."}[item["task"]]
        assert isinstance(item["text"], str) and item["text"].encode() is not None


def test_a_set_that_is_none_is_one_line(tmp_path):
    (tmp_path / "llama_questions_300.tsv").write_text("Question;Answer\n")
    for spec in (f"llama_questions:{tmp_path}", f"mustc:{tmp_path}", f"openaudiobench:{tmp_path}", f"covost2:{tmp_path / 'x.tsv'}"):
        with pytest.raises(common.UserError, match="--data"):
            common.read_set(spec, "French")


def test_an_encoder_that_remembers_gives_what_it_gave():
    encode, asked = evaluate.WordLlama(), []
    once = evaluate.remembered(lambda texts: asked.extend(texts) or encode(texts))
    for texts in (list(SENTENCES), [SENTENCES[2], "More.", SENTENCES[2]], list(SENTENCES[:1])):
        assert torch.equal(once(texts), encode(texts))
    assert asked == [*SENTENCES, "More."]


def test_multiple_choice_is_not_scored_by_containment(tmp_path):
    (tmp_path / "set.jsonl").write_text(json.dumps(dict(audio="a.wav", prompt="A or B?", reference="A")) + "\n")
    with pytest.raises(common.UserError, match="multiple choice"):
        common.read_set(f"voicebench:{tmp_path / 'set.jsonl'}", "French")


def test_a_recording_of_an_odd_rate_is_heard(tmp_path):
    """Against the same tone made at 16 kHz; torchaudio's own filter would take 2 GB here."""
    seconds = np.arange(22254) / 22254
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * seconds), 22254)
    wave = common.read_audio(tmp_path / "a.wav")
    assert len(wave) == 16000
    assert np.abs(wave.numpy() - 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).max() < 1e-3


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """04 on a set, by the untrained systems -> results.json's content."""
    def go(spec, *flags, systems=("text", "init"), name):
        monkeypatch.setattr(common, "load_speechlm", lambda *_: model)
        monkeypatch.setattr(evaluate, "available", lambda args: [*systems])
        monkeypatch.setattr(sys, "argv", ["04_evaluate.py", "--work", str(tmp_path / "work"), "--data", spec, *flags])
        evaluate.main()
        [path] = (tmp_path / "work").glob(f"results-*-{name}.json")        # the folder's name comes first
        return json.loads(path.read_text())
    return go


@pytest.mark.slow
def test_sets_of_one_task_and_two_targets(tmp_path, waves, run):
    """Translations into one language are none into the other; every table and figure does with what there is."""
    spec, _, _ = fleurs(tmp_path, waves)
    (tmp_path / "de_de").mkdir()
    (tmp_path / "de_de" / "test.tsv").write_text((tmp_path / "cmn_hans_cn" / "test.tsv").read_text().replace('我"要去商店。', "Ich gehe."))
    held = [run(spec.rpartition(":")[0] + f":{target}", "--conditions", "clean,speed:1.5,loss:5,clean", name=f"test-{language}")
            for target, language in (("cmn_hans_cn", "Chinese"), ("de_de", "German"))]
    assert held[0]["tokenizer"] == "zh" and held[1]["tokenizer"] == "13a" and held[0]["conditions"] == ["clean", "speed:1.5", "loss:5"]
    answers = [(tmp_path / "work" / "answers" / f"en_us-test-{language}" / "text.clean.jsonl").read_text() for language in ("Chinese", "German")]
    assert answers[0] != answers[1]
    assert "s2tt BLEU by condition" in (tmp_path / "work" / "results-en_us-test-German.md").read_text()
    assert (tmp_path / "work" / "results-en_us-test-German-conditions.png").exists()
    spec, _, _ = voicebench(tmp_path, waves)              # instruct without references
    path = tmp_path / "judged.jsonl"
    path.write_text((tmp_path / "set.jsonl").read_text().splitlines()[0] + "\n")
    held = run(f"voicebench:{path}", systems=("text",), name="judged")   # under noise text has nobody to be compared with
    assert {row["metric"] for row in held["rows"]} == {"log π_T", "tokens"}


def test_what_cant_be_heard_counts_as_wrong_until_it_can(tmp_path, waves, run, capsys):
    spec, _, _ = llama_questions(tmp_path, waves)
    held = run(spec, "--conditions", "clean", name="llama_questions_300")
    rows = {(row["system"], row["metric"]): row for row in held["rows"]}
    assert rows["init", "accuracy"]["n"] == 2 and rows["init", "accuracy"]["value"] == 50      # Paris, and nothing
    assert [*held["broken"]] == ["gone.wav"] and rows["init", "WER"]["value"] > 50
    assert "gone.wav" in capsys.readouterr().out
    answers = common.read_jsonl(tmp_path / "work" / "answers" / f"{tmp_path.name}-llama_questions_300" / "init.clean.jsonl")
    assert "Paris" in answers[0]["answer"] and answers[1]["answer"] == ""
    record(tmp_path / "gone.wav", waves[3])
    held = run(spec, "--conditions", "clean", name="llama_questions_300")
    answers = common.read_jsonl(tmp_path / "work" / "answers" / f"{tmp_path.name}-llama_questions_300" / "init.clean.jsonl")
    assert not held["broken"] and "Armstrong" in answers[1]["answer"]


def test_several_target_languages_and_a_judge_without_sft_are_one_line(tmp_path, waves, run):
    rows = [dict(id=language, audio=record(tmp_path / "a.wav", waves[0]), task="s2tt", instruction=FRANCE, reference="x y", language=language)
            for language in ("de", "fr")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(common.UserError, match="French and German"):
        run(str(tmp_path / "two.jsonl"), name="two")
    with pytest.raises(common.UserError, match="compares with sft"):
        run(str(tmp_path / "two.jsonl"), "--judge", "http://127.0.0.1:9/v1", name="two")


# ------------------------------------------------------------------------------------------------------------ judges
ITEMS = [dict(id=str(i), task=task, text=text, prompt="") for i, (task, text) in enumerate(
    [("instruct", CHICKEN), ("sqa", FRANCE), ("instruct", STORE), ("instruct", MOON)])]
ANSWERS = (["Grill it slowly, then let it rest.", "Paris", "Good.", "Neil."], ["Bake.", "Paris", "Have a nice walk to the store.", "Neil."])


@pytest.fixture
def served():
    """A real HTTP server that speaks the protocol and says that the longer answer is better, A where they are equal."""
    import http.server
    import threading
    asked, broken = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, value):
            body = json.dumps(value).encode()
            self.send_response(500 if broken else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply({"data": [{"id": "the-longer-one"}]})

        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = question["messages"][0]["content"]
            asked.append((question["model"], text))
            a, b = text.partition("Answer A: ")[2].split("\n\nAnswer B: ")
            self.reply({"choices": [{"message": {"content": "A worse one than B." if len(b) > len(a) else "A is better than B"}}]})

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, broken
    server.shutdown()


def test_a_served_judge_is_asked_in_both_orders_and_once(served, tmp_path):
    url, asked, broken = served
    judge = evaluate.ServedJudge(url)
    path = tmp_path / "judged.jsonl"
    path.write_text(json.dumps(dict(at=0, key="old", prefers=0.25)) + "\n" + '{"at": 2, "key": "k')      # another run's, and what a kill cut
    for _ in range(2):                                    # the second time nobody is asked
        assert evaluate.compare_answers(judge, path, ITEMS, "k", *ANSWERS) == [1.0, None, 0.0, 0.5]
        assert len(asked) == 6 and {model for model, _ in asked} == {"the-longer-one"}
    assert sum("Answer A: Bake." in text for _, text in asked) == sum("Answer B: Bake." in text for _, text in asked) == 1
    assert [sum("Request: " + item["text"] in text for _, text in asked) for item in ITEMS] == [2, 0, 2, 2]
    broken.append(True)
    with pytest.raises(common.UserError, match="http://127.0.0.1.*run the same command again"):
        evaluate.compare_answers(judge, path, ITEMS, "other", *ANSWERS)
    for url in ("http://127.0.0.1:9/v1", "http://127.0.0.1:port/v1", "http://[/v1"):
        with pytest.raises(common.UserError, match="no answer from models"):
            evaluate.ServedJudge(url)


@pytest.mark.parametrize("reply, expected", [("A", 1), ("B.", 0), ("**A**", 1), ("Answer B is better", 0), ("A. More helpful than B", 1),
                                             ("B\n\nBecause answer A", 0), ("I would choose B", 0), ("Both are fine", 0.5), ("", 0.5), (None, 0.5)])
def test_a_judges_verdict_is_read(reply, expected, monkeypatch):
    judge = evaluate.ServedJudge.__new__(evaluate.ServedJudge)
    judge.model = "x"
    monkeypatch.setattr(judge, "call", lambda route, pick, **_: pick({"choices": [{"message": {"content": reply}}]}), raising=False)
    assert judge.prefers(ITEMS[0], "a", "b") == expected


def test_a_model_without_a_trained_head_is_no_reward_model():
    for name in ("smollm2-135m", "minilm-l6"):
        with pytest.raises(common.UserError, match="no reward model can be loaded"):
            common.RewardModel(name, "cpu")


def test_judgements_enter_the_table_with_and_without_length(model):
    encoders = {"similarity": lambda texts: stage("04_evaluate").torch.ones(len(texts), 1)}
    items = [item | {"reference": ["Neil."], "language": "English"} for item in ITEMS]
    runs = {system: [evaluate.measure(items, [(a, len(a), True) for a in said], None, [-1.0] * 4, encoders, preferences)]
            for system, said, preferences in (("sft", ANSWERS[1], None), ("rba", ANSWERS[0], [1.0, None, 0.0, 0.5]))}
    rows = {(row["system"], row["metric"]): row for row in evaluate.compare({"clean": runs})}
    assert rows["rba", "judged"]["value"] == 50 and rows["rba", "wins"]["value"] == 50 and ("sft", "judged") not in rows
    assert {metric for system, metric in rows if system == "rba"} >= {"LC judged", "LC wins", "tokens", "chrF"}


@pytest.mark.slow
def test_a_model_that_transformers_serves_can_judge(server, tmp_path):
    url, name = server
    judge = evaluate.ServedJudge(f"{url}#{name}")
    forth, back, same = (evaluate.compare_answers(judge, tmp_path / f"{i}.jsonl", ITEMS, "k", *pair)
                         for i, pair in enumerate((ANSWERS, ANSWERS[::-1], ANSWERS[:1] * 2)))
    assert all(value in (0, 0.25, 0.5, 0.75, 1) for value in forth if value is not None)
    assert [a is None or a + b == 1 for a, b in zip(forth, back)] == [True] * 4              # its taste for a position cancels
    assert same == [0.5, None, 0.5, 0.5]


# ------------------------------------------------------------------------------------------------------ statistics
def test_the_length_controlled_win_rate_takes_length_out():
    """Preferences made with a known quality and a known taste for length; the fit by scipy-free brute force on a grid."""
    rng = np.random.default_rng(0)
    n, theta, phi = 4000, 0.4, -1.8
    base = rng.normal(100, 30, n)
    own = base + rng.normal(40, 25, n)                    # longer answers, which the judge likes
    x = np.tanh((base - own) / (base - own).std())
    wins = (rng.random(n) < 1 / (1 + np.exp(-(theta + phi * x)))).astype(float)
    assert 100 * wins.mean() > 80                         # what length buys
    got = evaluate.length_controlled(wins, own, base)[0]
    assert got == pytest.approx(100 / (1 + np.exp(-theta)), abs=4)
    few = slice(0, 60)
    grid_t, grid_p = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-4, 1, 501), indexing="ij")
    some = np.tanh((base - own)[few] / (base - own)[few].std())
    logits = grid_t[..., None] + grid_p[..., None] * some
    score = (wins[few] * logits - np.log1p(np.exp(logits))).sum(-1) - 0.5 * (grid_p + 1.6) ** 2 - 0.005 * grid_t ** 2
    best = grid_t.flat[score.argmax()]
    assert evaluate.length_controlled(wins[few], own[few], base[few])[0] == pytest.approx(100 / (1 + np.exp(-best)), abs=0.3)
    counts = np.random.default_rng(1).multinomial(60, [1 / 60] * 60, size=3)
    together = evaluate.length_controlled(wins[few], own[few], base[few], counts)
    for row, value in zip(counts, together):              # resampled at once as one by one
        assert evaluate.length_controlled(wins[few], own[few], base[few], row[None])[0] == pytest.approx(value, abs=1e-6)
    assert 90 < evaluate.length_controlled(np.ones(30), own[:30], base[:30])[0] < 100     # all won: no infinity
    assert evaluate.length_controlled(np.full(5, 0.5), own[:1].repeat(5) + 1, own[:1].repeat(5))[0] == pytest.approx(50)   # one gap: no length


def test_paired_tests_are_sacrebleus():
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice("le la chat chien maison mange dort voit grand petit".split(), 8)) for _ in range(40)]
    items = [dict(task="s2tt", reference=[text], language="French") for text in references] + [dict(task="sqa", reference=["x"])]
    def spoilt(rate):
        return [" ".join(w if rng.random() > rate else "zut" for w in text.split()) for text in references] + ["x"]
    found = evaluate.paired_tests(items, {"rba": spoilt(0.1), "sft": spoilt(0.4), "same": None} | {"same": spoilt(0.4)})
    assert set(found) == {"rba", "same"} and found["rba"]["BLEU"] < 0.01 < 0.05 < found["same"]["chrF"]
    assert evaluate.paired_tests(items, {"rba": spoilt(0.1)}) == {}
    assert evaluate.paired_tests(items, dict.fromkeys(("sft", "rba"), spoilt(0.1)))["rba"] == {"BLEU": 1, "chrF": 1}
    assert sacrebleu.BLEU(tokenize=evaluate.tokenizer(dict(language="Chinese"))).corpus_score(["我去"], [["我去"]]).precisions[0] == 100


def test_the_robustness_table_and_figure(tmp_path):
    measured = {condition: {system: [{("sqa", "accuracy"): (np.full((4, 1), value), evaluate.mean),
                                      ("sqa", "WER"): (np.full((4, 2), [1.0, 4.0]), lambda sums, n: 100 * sums[..., 0] / sums[..., 1])}]
                            for system, value in (("sft", score), ("rba", score + 5))}
                for condition, score in (("clean", 80.0), ("noise:5", 40.0), ("speed:1.5", 60.0))}
    lines, rows = [], evaluate.compare(measured)
    evaluate.robustness_table(rows, lines)
    assert "| noise:5 | 25.0 | 40.0 [40.0, 40.0] (-50 %) | 45.0 [45.0, 45.0] (-47 %) |" in lines
    evaluate.plot_robustness(rows, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000
