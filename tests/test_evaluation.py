"""04 on public sets, each written here in its published format, and its statistics against independent references."""
import http.server
import itertools
import json
import math
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import sacrebleu
import soundfile
from conftest import SENTENCES, stage

import common

evaluate = stage("04_evaluate")
FRANCE, CHICKEN, STORE, MOON = SENTENCES


def record(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave.numpy(), common.RATE)
    return path.name


# ---------------------------------------------------------------------------------------------------- public sets
def llama_questions(folder, waves):
    """CRLF, trailing spaces, one recording missing."""
    rows = ["Questions\tAnswer\tWav Filename", f"{FRANCE} \tParis \t{record(folder / 'q1.wav', waves[0])} ",
            f"{MOON}\tNeil Armstrong\tgone.wav", ""]
    (folder / "llama_questions_300.tsv").write_bytes("\r\n".join(rows).encode())
    return f"llama_questions:{folder}", [("sqa", FRANCE, ["Paris"])], ["gone.wav"]


def trivia_qa(folder, waves):
    """A comma, quotes and a line break in cells; answers as a Python list or in one cell, one of them without words."""
    folder = folder / "eval_datas" / "trivia_qa"
    record(folder / "audios" / "a.wav", waves[0])
    record(folder / "audios" / "b.wav", waves[3])
    (folder / "trivia_qa.csv").write_text(
        "question,answer_normalized_aliases,answer_normalized_value,audio_filename\n"
        f'"{FRANCE}","[\'paris\', ""paris\'s city""]",paris,a.wav\n'
        f'"{MOON}\n","neil armstrong, armstrong",neil,b.wav\nWhat is it?,"[\'it\']",it,c.wav\nNobody?,[],,a.wav\n')
    expected = [("sqa", FRANCE, ["paris", "paris's city", "paris"]),
                ("sqa", MOON, ["neil armstrong", "armstrong", "neil"])]
    return f"openaudiobench:{folder}", expected, ["c.wav", "a.wav#2"]


def subset(folder, name, wave, table):
    folder = folder / "eval_datas" / name
    record(folder / "audios" / "a.wav", wave)
    (folder / f"{name}.csv").write_text(table)
    return f"openaudiobench:{folder}"


def alpaca_eval(folder, waves):
    table = f'instruction,output,audio_filename\n"{CHICKEN}","[Your Name] Grill it.",a.wav\n'
    spec = subset(folder, "alpaca_eval", waves[1], table)
    return spec, [("instruct", CHICKEN, ["[Your Name] Grill it."])], []


def web_questions(folder, waves):
    table = (f"question,answers,audio_filename\n{FRANCE},\"['Paris', 'Paris, France']\",a.wav\n"
             f'{FRANCE},"Paris;Paris, France",a.wav\n')
    return subset(folder, "web_questions", waves[0], table), [("sqa", FRANCE, ["Paris", "Paris, France"])] * 2, []


def voicebench(folder, waves):
    """Without a reference (for a judge), with one, with several, with a number; files that are missing or no audio."""
    rows = [dict(audio=record(folder / f"{i}.wav", waves[i]), prompt=SENTENCES[i]) for i in (1, 0, 3, 2)]
    rows[1]["reference"], rows[2]["reference"], rows[3]["reference"] = "Paris", ["Neil Armstrong", "Armstrong"], 1969
    (folder / "broken.wav").write_text("no audio")
    rows += [dict(audio="broken.wav", prompt="Hello?"), dict(audio="gone.wav", prompt="Hello?")]
    common.write_jsonl(folder / "set.jsonl", rows)
    expected = [("instruct", CHICKEN, []), ("sqa", FRANCE, ["Paris"]),
                ("sqa", MOON, ["Neil Armstrong", "Armstrong"]), ("sqa", STORE, ["1969"])]
    return f"voicebench:{folder / 'set.jsonl'}", expected, ["broken.wav", "gone.wav"]


def covost2(folder, waves):
    """Quotes are text, a backslash escapes; recordings are mp3."""
    (folder / "clips").mkdir()
    soundfile.write(folder / "clips" / "en_1.mp3", waves[2].numpy(), common.RATE)
    path = folder / "covost_v2.en_de.test.tsv"
    path.write_text('path\tsentence\ttranslation\tclient_id\n'
                    f'en_1.mp3\t"{STORE}\t"Ich gehe\\\tin den Laden.\tabc\nen_2.mp3\tGone.\tWeg.\tabc\n')
    return f"covost2:{path}", [("s2tt", '"' + STORE, ['"Ich gehe\tin den Laden.'])], ["en_2.mp3"]


def mustc(folder, waves):
    """Segments of a long recording by offset and duration, line by line with texts that hold a line separator."""
    import torch
    folder = folder / "en-fr" / "data" / "tst-COMMON"
    record(folder / "wav" / "ted_1.wav", torch.cat([waves[0], torch.zeros(common.RATE), waves[2]]))
    first, second = len(waves[0]) / common.RATE, len(waves[2]) / common.RATE
    (folder / "txt").mkdir()
    (folder / "txt" / "tst-COMMON.yaml").write_text(
        f"- {{duration: {first:.6f}, offset: 0.0, rW: 3, speaker_id: spk.1, wav: ted_1.wav}}\n"
        f"- {{duration: {second:.6f}, offset: {first + 1:.6f}, rW: 3, speaker_id: spk.1, wav: ted_1.wav}}\n")
    (folder / "txt" / "tst-COMMON.en").write_text(f"{FRANCE}\n{STORE}\n")
    (folder / "txt" / "tst-COMMON.fr").write_text("Quelle\u2028capitale ?\nJe vais au magasin.\n")
    expected = [("s2tt", FRANCE, ["Quelle\u2028capitale ?"]), ("s2tt", STORE, ["Je vais au magasin."])]
    return f"mustc:{folder}", expected, []


def fleurs(folder, waves):
    """No header; two speakers share an id; quotes are text; an id without translation."""
    for name in ("7.wav", "8.wav", "9.wav"):
        record(folder / "en_us" / "audio" / "test" / name, waves[2])
    row = "{}\t{}\t{}\tx\tx|\t100\tMALE\n"
    (folder / "en_us" / "test.tsv").write_text(
        row.format(5, "7.wav", STORE) + row.format(5, "8.wav", STORE) + row.format(6, "9.wav", STORE))
    (folder / "cmn_hans_cn").mkdir()
    (folder / "cmn_hans_cn" / "test.tsv").write_text(row.format(5, "1.wav", '我"要去商店。'))
    spec = f"fleurs:{folder / 'en_us' / 'test.tsv'}:cmn_hans_cn"
    return spec, [("s2tt", STORE, ['我"要去商店。'])] * 2, ["9.wav"]


def ours(folder, waves):
    rows = [dict(id="a", audio=record(folder / "a.wav", waves[0]), task="sqa", instruction=FRANCE, reference="Paris"),
            dict(id="b", audio="a.wav", task="instruct", text=FRANCE, reference=["Paris.", "It is Paris."]),
            dict(id="c", audio="a.wav", task="s2tt", text=FRANCE, reference="法国的首都是哪里？", language="zh")]
    common.write_jsonl(folder / "mine.jsonl", rows)
    expected = [("sqa", FRANCE, ["Paris"]), ("instruct", FRANCE, ["Paris.", "It is Paris."]),
                ("s2tt", FRANCE, ["法国的首都是哪里？"])]
    return str(folder / "mine.jsonl"), expected, []


SETS = (llama_questions, trivia_qa, alpaca_eval, web_questions, voicebench, covost2, mustc, fleurs, ours)
TARGETS = {covost2: {"German"}, mustc: {"French"}, fleurs: {"Chinese"}, ours: {"Chinese"}}


@pytest.mark.parametrize("write", SETS, ids=lambda write: write.__name__)
def test_a_set_is_read_as_published(write, tmp_path, waves):
    spec, expected, lost = write(tmp_path, waves)
    name, folder, items, broken = evaluate.read_set(spec, "French")
    good = [item for item in items if item["id"] not in broken]
    assert [(item["task"], item["text"], item["reference"]) for item in good] == expected
    assert list(broken) == lost and len({item["id"] for item in items}) == len(expected) + len(lost)
    for item in good:                                     # the very samples: of a long recording, the segment
        wave, whole = common.item_wave(folder, item), waves[SENTENCES.index(item["text"].strip('"'))]
        assert abs(len(wave) - len(whole)) <= (2400 if item["audio"].endswith("mp3") else 2)
    assert {item["language"] for item in items if item["task"] == "s2tt"} == TARGETS.get(write, set())
    for item in items:
        assert item["prompt"] == common.REQUESTS[item["task"]].format(language=item["language"])
        assert item["group"] == item["id"]


def test_a_split_of_ours_keeps_its_groups(tmp_path, waves):
    rows = [dict(id=f"g-{s}", group="g", task="instruct", text=CHICKEN, prompt="", response="Roast it.", language="English",
                 reference=["Roast it."], audio=record(tmp_path / f"{s}.wav", waves[1]), voice=f"v{s}") for s in (0, 1)]
    common.write_jsonl(tmp_path / "valid.jsonl", rows)
    assert evaluate.read_set(str(tmp_path / "valid.jsonl"), "French")[2] == rows


def test_a_set_that_is_none_is_one_line(tmp_path, waves):
    (tmp_path / "llama_questions_300.tsv").write_text("Question;Answer\n")
    (tmp_path / "abc.jsonl").write_text(json.dumps(dict(audio="a.wav", prompt="A or B?", reference="A")) + "\n")
    rows = [dict(id=code, audio=record(tmp_path / "a.wav", waves[0]), task="s2tt", instruction=FRANCE, reference="x y",
                 language=code) for code in ("de", "fr")]
    common.write_jsonl(tmp_path / "two.jsonl", rows)
    for spec, reason in ((f"llama_questions:{tmp_path}", "no item"), (f"mustc:{tmp_path}", "not as published"),
                         (f"openaudiobench:{tmp_path}", "not as published"), (str(tmp_path / "x.jsonl"), "missing"),
                         (f"voicebench:{tmp_path / 'abc.jsonl'}", "multiple choice"),
                         (str(tmp_path / "two.jsonl"), "French and German")):
        with pytest.raises(common.UserError, match=reason):
            evaluate.read_set(spec, "French")


# ----------------------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """04 on a set, by the untrained systems -> results.json's content and the answers of `base`."""
    def go(spec, *flags, systems="text,base"):
        monkeypatch.setattr(common, "load_speechlm", lambda *_: model)
        monkeypatch.setattr(sys, "argv", ["04_evaluate.py", "--work", str(tmp_path / "work"), "--data", spec,
                                          "--systems", systems, "--conditions", "clean", *flags])
        evaluate.main()
        name = evaluate.read_set(spec, "French")[0]
        answers = common.read_jsonl(tmp_path / "work" / "answers" / name / "base.clean.jsonl")
        return json.loads((tmp_path / "work" / f"results-{name}.json").read_text()), answers
    return go


def numbers(held):
    return {(row["condition"], row["system"], row["task"], row["metric"]): row for row in held["rows"]}


def test_what_cant_be_heard_counts_as_wrong_until_it_can(tmp_path, waves, run, capsys):
    spec, _, _ = llama_questions(tmp_path, waves)
    held, answers = run(spec)
    found = numbers(held)
    assert found["clean", "base", "sqa", "accuracy"]["value"] == 50       # Paris, and nothing
    assert found["clean", "Whisper", "sqa", "WER"]["value"] > 50 and held["broken"] == ["gone.wav"]
    assert "gone.wav" in capsys.readouterr().out
    assert "Paris" in answers[0]["answer"] and answers[1]["answer"] == ""
    record(tmp_path / "gone.wav", waves[3])
    held, answers = run(spec)
    assert not held["broken"] and "Armstrong" in answers[1]["answer"]
    (tmp_path / "again.json").write_text(json.dumps(held))
    text = next((tmp_path / "work").glob("results-*.md")).read_text()
    evaluate.report(json.loads((tmp_path / "again.json").read_text()), tmp_path / "again.json")           # --draw
    assert (tmp_path / "again.md").read_text() == text and (tmp_path / "again.png").stat().st_size > 5000
    assert "| base |" in text and "Translation" not in text and "Consistency" not in text


def test_instructions_without_references_are_for_a_judge(tmp_path, waves, run):
    spec, _, _ = voicebench(tmp_path, waves)
    path = tmp_path / "set.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    held, _ = run(spec)
    assert {row["metric"] for row in held["rows"]} == {"tokens", "WER"}


def test_the_tables_of_a_whole_run(work):
    held, items = json.loads((work / "results.json").read_text()), common.read_items(work, "test")
    found = numbers(held)
    assert "rba-group" in held["systems"] and "cascade" not in held["systems"]
    for condition in held["conditions"]:
        assert found[condition, "text", "sqa", "accuracy"]["value"] == 100     # y_ref is the reference
        assert found[condition, "text", "instruct", "consistency"]["value"] == pytest.approx(1)
        path = work / "answers" / "test" / f"base.{condition.replace(':', '-')}.jsonl"
        assert [line["id"] for line in common.read_jsonl(path)] == [item["id"] for item in items]
    for row in held["rows"]:
        assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 or row["metric"] == "BLEU"
    text = (work / "results.md").read_text()
    assert "Planned contrasts" in text and "Unheard voices" in text and (work / "results.png").stat().st_size > 5000


# --------------------------------------------------------------------------------------------------------- judges
def rows_of(*answers, texts=(CHICKEN, STORE, MOON), groups="abc"):
    return [dict(task="instruct", group=group, text=text, prompt="", answer=own, tokens=len(own), reference=["Neil."])
            for own, text, group in zip(answers, texts, groups)]


OWN = rows_of("Grill it slowly, then let it rest.", "Good.", "Neil.")
OTHER = rows_of("Bake.", "Have a nice walk to the store.", "Neil.")


@pytest.fixture
def served():
    """A real HTTP server that speaks the protocol and says that the longer answer is better."""
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
            said = "A worse one than B." if len(b) > len(a) else "A is better than B"
            self.reply({"choices": [{"message": {"content": said}}]})

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, broken
    server.shutdown()


def test_a_served_judge_is_asked_in_both_orders_and_once(served, tmp_path):
    url, asked, broken = served
    path = tmp_path / "judged.jsonl"
    path.write_text('{"key": "other", "prefers": 0.25}\n{"key": "k')       # another pair's, and what a kill cut
    for _ in range(2):                                    # the second time nobody is asked
        judge = evaluate.KeptJudge(url, evaluate.ServedJudge(url), path)
        assert judge(OWN, OTHER) == [1.0, 0.0, 0.5]
        assert len(asked) == 4 and {name for name, _ in asked} == {"the-longer-one"}     # equal answers: nobody either
    assert [sum(f"Answer {side}: Bake." in text for _, text in asked) for side in "AB"] == [1, 1]
    assert all(f"Request: {CHICKEN}" in text or f"Request: {STORE}" in text for _, text in asked)
    assert len(common.read_jsonl(path)) == 3
    assert judge(OTHER, OWN) == [0.0, 1.0, 0.5]           # the other way round is another question
    broken.append(True)
    with pytest.raises(common.UserError, match="http://127.0.0.1.*run the same command again"):
        judge(rows_of("New."), OTHER)


@pytest.mark.parametrize("reply, expected", [
    ("A", 1), ("B.", 0), ("**A**", 1), ("Answer B is better", 0), ("A. More helpful than B", 1),
    ("B\n\nBecause answer A", 0), ("I would choose B", 0), ("Both are fine", 0.5), ("", 0.5), ("None", 0.5)])
def test_a_judges_verdict_is_read(reply, expected):
    assert evaluate.read_verdict(reply) == expected


def test_without_a_judge_the_closer_answer_wins():
    vectors = {"Neil.": np.array([1.0, 0]), "near": np.array([0.8, 0.6]), "far": np.array([0.0, 1])}
    own, other = rows_of("near", "far", "near"), rows_of("far", "near", "near")
    assert evaluate.closer(own, other, vectors).tolist() == [1, 0, 0.5]


# ------------------------------------------------------------------------------------------------------ statistics
def test_containment_is_by_words_and_f1_by_hand():
    assert evaluate.is_contained("Mount Everest", "It's mount everest, I think.")
    assert not evaluate.is_contained("Ca", "because of that") and not evaluate.is_contained("", "anything")
    assert evaluate.token_f1("a red car", "the red house") == pytest.approx(2 * 1 / 6)
    assert evaluate.token_f1("Paris", "Paris") == 1 and evaluate.token_f1("Paris", "") == 0


def test_corpus_scores_are_sacrebleus_own():
    answers = ["le chat est sur la table", "bonjour tout le monde", "je suis ici", "zut", "", "rien du tout ici"]
    references = [["le chat est sur le tapis", "le chat"], ["bonjour le monde"], ["je suis là"], ["à demain"],
                  ["un mot"], ["tout ici rien du"]]
    rows = [dict(answer=answer, reference=own, language="French") for answer, own in zip(answers, references)]
    scores = evaluate.measure_s2tt(rows, list("aabbcd"), None)
    padded = [[own[0] for own in references], [own[-1] for own in references]]
    for name, function in (("BLEU", sacrebleu.corpus_bleu), ("chrF", sacrebleu.corpus_chrf)):
        assert scores[name][0] == pytest.approx(function(answers, padded).score)
        for drawn, score in list(zip(evaluate.resample_counts(4), scores[name]))[1:30]:
            rows = []                                     # a group's utterances come together
            for group, times in zip(((0, 1), (2, 3), (4,), (5,)), drawn):
                rows += list(group) * int(times)
            expected = function([answers[i] for i in rows], [[side[i] for i in rows] for side in padded]).score
            assert score == pytest.approx(expected, abs=1e-9)
    chinese = evaluate.translation_metrics("Chinese")["BLEU"]
    assert chinese.corpus_score(["我去"], [["我去"]]).precisions[0] == 100


def test_instructions_are_resampled_whole():
    """Against plain numpy: draw groups, take all their utterances."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"g{i:02d}" for i in range(25)], 4)
    values = np.repeat(rng.normal(0, 10, 25), 4) + rng.normal(0, 1, 100)   # the voices of a group are alike
    shuffled = rng.permutation(100)
    row = evaluate.entry([evaluate.mean_score(evaluate.group_means(values[shuffled], groups[shuffled]))], "s", "t", "m")
    by_hand = []
    for _ in range(4000):
        by_hand.append(values.reshape(25, 4)[rng.integers(25, size=25)].mean())
    assert row["value"] == pytest.approx(values.mean())
    assert (row["low"], row["high"]) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.3)
    utterances = evaluate.mean_score(values)[1:]          # as if they were independent: half as wide
    assert np.ptp(np.percentile(utterances, [2.5, 97.5])) < 0.6 * (row["high"] - row["low"])


def test_an_interval_covers_the_truth_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 400)
    evaluate.resample_counts.cache_clear()
    generator, hits = np.random.default_rng(0), 0
    for _ in range(300):
        row = evaluate.entry([evaluate.mean_score(generator.normal(1.0, 2.0, 60))], "s", "t", "m")
        hits += row["low"] <= 1.0 <= row["high"]
    evaluate.resample_counts.cache_clear()
    assert 0.90 <= hits / 300 <= 0.98


def test_holm_by_hand_and_p_of_a_known_shift():
    assert evaluate.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluate.holm([0.6, 0.5]) == [1.0, 1.0] and evaluate.holm([]) == []
    generator = np.random.default_rng(0)
    for shift in (0.1, 0.2, 0.3):                         # against the normal test's
        values = generator.normal(0, 1, 100)
        values += shift - values.mean()
        z = shift * 10 / values.std()
        normal = math.erfc(z / 2 ** 0.5)
        assert evaluate.p_value(evaluate.mean_score(values)) == pytest.approx(normal, abs=0.03)
    assert evaluate.p_value(np.zeros(101)) == 1


def test_consistency_against_a_brute_force_loop():
    rng = np.random.default_rng(0)
    groups = list("aaaabbbccccdd")
    vectors = rng.normal(size=(len(groups), 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = rng.permutation(len(groups))
    same, different = evaluate.consistency(vectors[order], [groups[i] for i in order])

    def members(group):
        return [vectors[i] for i, own in enumerate(groups) if own == group]
    for at, group in enumerate("abcd"):
        pairs = [u @ v for u, v in itertools.combinations(members(group), 2)]
        assert same[at] == pytest.approx(np.mean(pairs))
    for score, drawn in zip(different[:20], evaluate.resample_counts(4)[:20].astype(int)):
        pairs = []
        for one, two in itertools.combinations([g for g, n in zip("abcd", drawn) for _ in range(n)], 2):
            if one != two:                                # an instruction drawn twice is no other instruction
                pairs.append(np.mean([u @ v for u, v in itertools.product(members(one), members(two))]))
        assert score == pytest.approx(np.mean(pairs) if pairs else 0)


def instruct_rows(answers, transcripts, groups):
    rows = []
    for answer, transcript, group in zip(answers, transcripts, groups):
        rows.append(dict(task="instruct", group=group, answer=answer, transcript=transcript, text="x", prompt="",
                         reference=["r"], tokens=1))
    return rows


def test_consistency_over_groups_that_were_heard_differently():
    vectors = {"r": np.array([1.0, 0]), "s": np.array([0.0, 1])}
    rows = instruct_rows("rrrsrr", ["hi", "Hi!", "hi", "ho", "a", "b"], "aabbcc")
    scores = evaluate.measure(rows, {"similarity": vectors})
    assert scores["instruct", "consistency"][0] == pytest.approx(2 / 3)
    assert scores["instruct", "consistency, heard differently"][0] == pytest.approx(1 / 2)     # b and c
    assert scores["instruct", "similarity"][0] == pytest.approx(5 / 6)
    assert scores["instruct", "different instructions"][0] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)


def test_the_length_controlled_win_rate_takes_length_out():
    """Preferences made with a known quality and a known taste for length; the fit by brute force on a grid."""
    rng = np.random.default_rng(0)
    n, theta, phi, once = 4000, 0.4, -1.8, np.ones((1, 4000))
    base = rng.normal(100, 30, n)
    own = base + rng.normal(40, 25, n)                    # longer answers, which the judge likes
    x = np.tanh((base - own) / (base - own).std())
    wins = (rng.random(n) < 1 / (1 + np.exp(-(theta + phi * x)))).astype(float)
    assert 100 * wins.mean() > 80                         # what length buys
    truth = 100 / (1 + np.exp(-theta))
    assert evaluate.length_controlled(wins, own, base, once)[0] == pytest.approx(truth, abs=4)
    wins, own, base = wins[:60], own[:60], base[:60]
    grid_t, grid_p = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-4, 1, 501), indexing="ij")
    some = np.tanh((base - own) / (base - own).std())
    logits = grid_t[..., None] + grid_p[..., None] * some
    score = (wins * logits - np.log1p(np.exp(logits))).sum(-1) - 0.5 * (grid_p + 1.6) ** 2 - 0.005 * grid_t ** 2
    best = 100 / (1 + np.exp(-grid_t.flat[score.argmax()]))
    counts = np.vstack([np.ones(60), rng.multinomial(60, [1 / 60] * 60, size=3)])
    together = evaluate.length_controlled(wins, own, base, counts)
    assert together[0] == pytest.approx(best, abs=0.3)
    for drawn, value in zip(counts, together):            # resampled at once as one by one
        assert evaluate.length_controlled(wins, own, base, drawn[None])[0] == pytest.approx(value, abs=1e-6)
    one = np.ones((1, 60))
    assert 90 < evaluate.length_controlled(one[0], own, base, one)[0] < 100                    # all won: no infinity
    assert evaluate.length_controlled(one[0] / 2, base + 1, base, one)[0] == pytest.approx(50)   # one gap: no length


# ------------------------------------------------------------------------------------------- numbers of a condition
def sqa_rows(right, groups=None):
    return [dict(task="sqa", group=str(i) if groups is None else groups[i], text="x", prompt="", transcript="x",
                 reference=["yes"], answer="yes" if good else "no", tokens=1, voice="ab"[i % 2])
            for i, good in enumerate(right)]


def test_seeds_are_one_row_and_a_paired_difference_is_tight():
    rng = np.random.default_rng(0)
    base = rng.random(300) < 0.5
    runs = {"base": base, "sft+": base, "sft+-s1": base}
    for at, name in enumerate(("rba-single", "rba-single-s1", "rba-single-s2")):
        runs[name] = base | (rng.random(300) < 0.1 + 0.1 * at)
    by_run = {name: sqa_rows(right) for name, right in runs.items()}
    seeds = {"base": ["base"], "sft+": ["sft+", "sft+-s1"], "rba-single": [*runs][3:]}
    rows, contrasts = evaluate.numbers(by_run, seeds, None, {"similarity": {}}, {"a"})
    found = {(row["system"], row["metric"]): row for row in rows}
    each = [100 * runs[name].mean() for name in seeds["rba-single"]]
    row, difference = found["rba-single", "accuracy"], found["rba-single", "accuracy − base"]
    assert row["seeds"] == pytest.approx(each) and row["value"] == pytest.approx(np.mean(each))
    assert found["base", "accuracy"]["seeds"] == [] and ("base", "accuracy − base") not in found
    assert difference["value"] == pytest.approx(np.mean(each) - 100 * base.mean())
    assert row["high"] - row["low"] > 1.5 * (difference["high"] - difference["low"])
    mean = np.mean([runs[name] for name in seeds["rba-single"]], 0)        # items alone are resampled
    by_hand = [100 * (mean - base)[rng.integers(300, size=300)].mean() for _ in range(4000)]
    assert (difference["low"], difference["high"]) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.5)
    [contrast] = contrasts
    assert contrast["system"] == "rba-single − sft+" and contrast["value"] == pytest.approx(difference["value"])
    assert contrast["p"] == contrast["holm"] < 0.001 and len(contrast["seeds"]) == 3
    unheard = found["base", "accuracy, unheard voices"]
    assert unheard["value"] == pytest.approx(100 * base[1::2].mean())
    assert evaluate.row_of("rba-group-s12") == "rba-group" and evaluate.row_of("sft-seed") == "sft-seed"


def test_win_rates_enter_the_tables_with_and_without_length():
    prefers = {"rba-group": 1.0, "sft+": 0.5, "sft": 0.5}

    def judge(rows, others):
        return [prefers[row["system"]] for row in rows]
    by_run = {}
    for name in prefers:
        by_run[name] = [row | dict(system=name, answer="n", transcript="x", tokens=3) for row in OWN]
    vectors = {"similarity": {"n": np.ones(1), "Neil.": np.ones(1)}}
    rows, contrasts = evaluate.numbers(by_run, {name: [name] for name in by_run}, judge, vectors)
    found = {(row["system"], row["metric"]): row["value"] for row in rows}
    assert found["rba-group", "WR against sft"] == 100 and found["sft+", "WR against sft"] == 50
    assert 75 < found["rba-group", "LC against sft"] < 100 and ("sft", "WR against sft") not in found
    assert [(row["system"], row["metric"], row["value"]) for row in contrasts] == [("rba-group − sft+", "WR", 50.0)]


def test_y_ref_is_in_no_contest_for_closeness_to_y_ref():
    vectors = {"similarity": {text: np.ones(1) for text in ("n", "Neil.")}}
    by_run = {name: [row | dict(answer="n", transcript="x", response="Neil.") for row in OWN] for name in ("text", "base")}
    seeds = {name: [name] for name in by_run}
    rows, _ = evaluate.numbers(by_run, seeds, None, vectors)
    assert not [row for row in rows if row["metric"].startswith("WR")]
    rows, _ = evaluate.numbers(by_run, seeds, lambda rows, others: [0.5] * len(rows), vectors)
    assert Counter(row["metric"] for row in rows)["WR against text"] == 1


def test_tables_and_figure_of_more_than_two_conditions(tmp_path):
    held = dict(preset="tiny", teacher="t", student="s", source="x", judge="", broken=[], items={"sqa": "4"},
                conditions=["clean", "noise:5", "loss:5"], leading="noise:5", systems=["base", "sft"], contrasts=[],
                rewarded={"base": [], "sft": []}, signatures="", rows=[])
    for condition, value in (("clean", 80.0), ("noise:5", 40.0), ("loss:5", 60.0)):
        for system, gain in (("base", 0), ("sft", 5)):
            held["rows"].append(dict(condition=condition, system=system, task="sqa", metric="accuracy",
                                     value=value + gain, low=value - 1, high=value + 9, seeds=[value, value + 1]))
        held["rows"].append(dict(condition=condition, system="Whisper", task="sqa", metric="WER", value=25.0, low=20.0,
                                 high=30.0, seeds=[]))
    evaluate.report(held, tmp_path / "r.json")
    text = (tmp_path / "r.md").read_text()
    assert "| noise:5 | 25.0 [20.0, 30.0] | 40.0 [39.0, 49.0] (40.0, 41.0) | 45.0 [39.0, 49.0] (40.0, 41.0) |" in text
    assert (tmp_path / "r.png").stat().st_size > 5000
