"""04 on public sets, written here as they are published; its statistics against independent references."""
import http.server
import itertools
import json
import math
import sys
import threading
from types import SimpleNamespace

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


# ------------------------------------------------------------------------------------------------ public sets
def llama_questions(folder, waves):
    """CRLF, trailing spaces, one recording missing."""
    rows = ["Questions\tAnswer\tWav Filename", f"{FRANCE} \tParis \t{record(folder / 'q1.wav', waves[0])} ",
            f"{MOON}\tNeil Armstrong\tgone.wav", ""]
    (folder / "llama_questions_300.tsv").write_bytes("\r\n".join(rows).encode())
    return f"llama_questions:{folder}", [("sqa", FRANCE, ["Paris"])], ["1"]


def trivia_qa(folder, waves):
    """A comma, quotes and a line break in cells; several answers in one, or none."""
    folder = folder / "eval_datas" / "trivia_qa"
    record(folder / "audios" / "a.wav", waves[0])
    record(folder / "audios" / "b.wav", waves[3])
    (folder / "trivia_qa.csv").write_text(
        "question,answer_normalized_aliases,answer_normalized_value,audio_filename\n"
        f'"{FRANCE}","paris, paris\'s city",paris,a.wav\n'
        f'"{MOON}\n","neil armstrong, armstrong",neil,b.wav\nWhat is it?,it,it,c.wav\nNobody?,,,a.wav\n')
    expected = [("sqa", FRANCE, ["paris", "paris's city"]), ("sqa", MOON, ["neil armstrong", "armstrong"])]
    return f"openaudiobench:{folder}", expected, ["2", "3"]


def web_questions(folder, waves):
    folder = folder / "eval_datas" / "web_questions"
    record(folder / "audios" / "a.wav", waves[0])
    (folder / "web_questions.csv").write_text(
        f'question,answers,audio_filename\n{FRANCE},"Paris;Paris, France",a.wav\n{FRANCE},Paris,a.wav\n')
    expected = [("sqa", FRANCE, ["Paris", "Paris, France"]), ("sqa", FRANCE, ["Paris"])]
    return f"openaudiobench:{folder}", expected, []


def covost2(folder, waves):
    """Quotes are text, a backslash escapes; recordings are mp3."""
    (folder / "clips").mkdir()
    soundfile.write(folder / "clips" / "en_1.mp3", waves[2].numpy(), common.RATE)
    path = folder / "covost_v2.en_de.test.tsv"
    path.write_text('path\tsentence\ttranslation\tclient_id\n'
                    f'en_1.mp3\t"{STORE}\t"Ich gehe\\\tin den Laden.\tabc\nen_2.mp3\tGone.\tWeg.\tabc\n')
    return f"covost2:{path}", [("s2tt", '"' + STORE, ['"Ich gehe\tin den Laden.'])], ["1"]


def mustc(folder, waves):
    """Segments of a long recording by offset and duration; texts line by line, one holds a line separator."""
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
    return spec, [("s2tt", STORE, ['我"要去商店。'])] * 2, ["2"]


def ours(folder, waves):
    """Without a reference (for a judge), with one, with several, with a number; files missing or no audio."""
    record(folder / "a.wav", waves[0])
    (folder / "broken.wav").write_text("no audio")
    rows = [dict(id=7, audio="a.wav", task="sqa", instruction=FRANCE, reference="Paris"),
            dict(id="b", audio="a.wav", task="instruct", text=FRANCE, reference=["Paris.", "It is Paris."]),
            dict(id="c", audio="a.wav", task="s2tt", text=FRANCE, reference="法国的首都是哪里？", language="zh"),
            dict(id="d", audio="a.wav", task="instruct", instruction=FRANCE),
            dict(audio="a.wav", instruction=FRANCE, reference=1969),
            dict(id="e", audio="a.wav", task="instruct", instruction=FRANCE, reference=None),
            dict(id="f", audio="a.wav", task="instruct", instruction=FRANCE, reference="")]
    rows += [dict(id=id_, audio=f"{id_}.wav", instruction="Hello?") for id_ in ("broken", 8)]
    common.write_jsonl(folder / "mine.jsonl", rows)
    expected = [("sqa", FRANCE, ["Paris"]), ("instruct", FRANCE, ["Paris.", "It is Paris."]),
                ("s2tt", FRANCE, ["法国的首都是哪里？"]), ("instruct", FRANCE, []), ("sqa", FRANCE, ["1969"])]
    expected += [("instruct", FRANCE, [])] * 2
    return str(folder / "mine.jsonl"), expected, ["broken", "8"]


SETS = (llama_questions, trivia_qa, web_questions, covost2, mustc, fleurs, ours)
TARGETS = {covost2: {"German"}, mustc: {"French"}, fleurs: {"Chinese"}, ours: {"Chinese"}}


@pytest.mark.parametrize("write", SETS, ids=lambda write: write.__name__)
def test_a_set_is_read_as_published(write, tmp_path, waves):
    spec, expected, lost = write(tmp_path, waves)
    name, folder, items = evaluate.read_set(spec, "French")
    good = evaluate.usable(items)
    assert [(item["task"], item["text"], item["reference"]) for item in good] == expected
    assert [item["id"] for item in items if "unusable" in item] == lost
    assert len({item["id"] for item in items}) == len(expected) + len(lost)
    for item in good:                                     # the very samples: of a long recording, the segment
        wave, whole = common.item_wave(folder, item), waves[SENTENCES.index(item["text"].strip('"'))]
        assert abs(len(wave) - len(whole)) <= (2400 if item["audio"].endswith("mp3") else 2)
    assert {item["language"] for item in items if item["task"] == "s2tt"} == TARGETS.get(write, set())
    for item in items:
        assert item["prompt"] == common.REQUESTS[item["task"]].format(language=item["language"])
        sentence = "556"[int(item["id"])] if write is fleurs else item["id"]   # one sentence, two speakers
        assert item["group"] == sentence


def test_a_split_of_ours_keeps_its_groups(tmp_path, waves):
    rows = []
    for s in (0, 1):
        audio = record(tmp_path / f"{s}.wav", waves[1])
        rows.append(dict(id=f"g-{s}", group="g", task="instruct", text=CHICKEN, prompt="", language="English",
                         response="Roast it.", reference=["Roast it."], audio=audio, voice=f"v{s}"))
    common.write_jsonl(tmp_path / "valid.jsonl", rows)
    assert evaluate.read_set(str(tmp_path / "valid.jsonl"), "French")[2] == rows


def test_a_set_that_is_none_is_one_line(tmp_path, waves):
    (tmp_path / "llama_questions_300.tsv").write_text("Question;Answer\n")
    record(tmp_path / "a.wav", waves[0])
    common.write_jsonl(tmp_path / "none.jsonl", [])
    rows = []
    for code in ("de", "fr"):
        rows.append(dict(id=code, audio="a.wav", task="s2tt", text=FRANCE, reference="x y", language=code))
    common.write_jsonl(tmp_path / "two.jsonl", rows)
    for spec, reason in ((f"llama_questions:{tmp_path}", "no item"),
                         (str(tmp_path / "none.jsonl"), "no item"),
                         (f"mustc:{tmp_path}", "not as published"), (str(tmp_path / "x.jsonl"), "missing"),
                         (f"openaudiobench:{tmp_path / 'x'}", "not as published"),
                         (str(tmp_path / "two.jsonl"), "French and German")):
        with pytest.raises(common.UserError, match=reason):
            evaluate.read_set(spec, "French")


# ------------------------------------------------------------------------------------------------- whole runs
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


def alone(results):
    """The numbers that are against no other system and over all voices."""
    found = {}
    for row in results["rows"]:
        if not row["against"] and row["voices"] == "all":
            found[row["condition"], row["system"], row["task"], row["metric"]] = row
    return found


def test_what_cant_be_heard_counts_as_wrong_until_it_can(tmp_path, waves, run, capsys):
    spec, _, _ = llama_questions(tmp_path, waves)
    results, answers = run(spec)
    found = alone(results)
    assert found["clean", "base", "sqa", "accuracy"]["value"] == 50       # Paris, and nothing
    assert found["clean", "Whisper", "sqa", "WER"]["value"] > 50 and results["unusable"] == ["1"]
    assert "gone.wav" in capsys.readouterr().out
    assert "Paris" in answers[0]["answer"] and answers[1]["answer"] == ""
    record(tmp_path / "gone.wav", waves[3])
    results, answers = run(spec)
    assert not results["unusable"] and "Armstrong" in answers[1]["answer"]
    (tmp_path / "again.json").write_text(json.dumps(results))
    text = next((tmp_path / "work").glob("results-*.md")).read_text()
    evaluate.report(json.loads((tmp_path / "again.json").read_text()), tmp_path / "again.json")    # --draw
    assert (tmp_path / "again.md").read_text() == text and (tmp_path / "again.png").stat().st_size > 5000
    assert "| base |" in text and "Translation" not in text and "Consistency" not in text


def test_answers_stay_while_their_key_does(tmp_path, waves, run, monkeypatch):
    spec, _, _ = llama_questions(tmp_path, waves)
    asked, answer = [], evaluate.answer
    monkeypatch.setattr(evaluate, "answer", lambda *given: asked.append(given[1]) or answer(*given))
    run(spec, systems="base")
    run(spec, systems="base")
    assert asked == ["base"]
    run(spec, "--seed", "1", systems="base")              # nothing that an answer depends on
    assert asked == ["base"]
    [path] = (tmp_path / "work" / "answers").rglob("base.clean.jsonl")
    lines = common.read_jsonl(path)
    common.write_jsonl(path, [line | dict(key="of other data") for line in lines])
    run(spec, systems="base")
    assert asked == ["base", "base"] and common.read_jsonl(path) == lines


def test_instructions_without_references_are_for_a_judge(tmp_path, waves, run):
    rows = [dict(id="a", audio=record(tmp_path / "a.wav", waves[1]), task="instruct", instruction=CHICKEN)]
    common.write_jsonl(tmp_path / "set.jsonl", rows)
    results, _ = run(str(tmp_path / "set.jsonl"))
    assert {row["metric"] for row in results["rows"]} == {"words", "WER"}


def test_the_tables_of_a_whole_run(work):
    results, items = json.loads((work / "results.json").read_text()), common.read_items(work, "test")
    found = alone(results)
    assert "rba-group" in results["systems"]
    for condition in results["conditions"]:
        assert found[condition, "text", "sqa", "accuracy"]["value"] == 100     # y_ref is the reference
        assert found[condition, "text", "instruct", "consistency"]["value"] == pytest.approx(1)
        path = work / "answers" / "test" / f"base.{condition.replace(':', '-')}.jsonl"
        assert [line["id"] for line in common.read_jsonl(path)] == [item["id"] for item in items]
    for row in results["rows"]:
        assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 or row["metric"] == "BLEU"
    text = (work / "results.md").read_text()
    assert "Planned contrasts" in text and "Heard and unheard voices" in text
    assert (work / "results.png").stat().st_size > 5000


# ----------------------------------------------------------------------------------------------------- judges
def rows_of(*answers, texts=(CHICKEN, STORE, MOON), groups="abc"):
    rows = []
    for answer, text, group in zip(answers, texts, groups):
        rows.append(dict(task="instruct", group=group, text=text, prompt="", reference=["Neil."],
                         answer=answer, words=len(answer.split())))
    return rows


OWN = rows_of("Grill it slowly, then let it rest.", "Good.", "Neil.")
OTHER = rows_of("Bake.", "Have a nice walk to the store.", "Neil.")
ALIKE = {text: np.ones(1) for text in ("n", "Neil.", CHICKEN, STORE, MOON)}   # an encoder's vectors


@pytest.fixture
def served():
    """A real HTTP server that speaks the protocol and says that the longer answer is better."""
    asked, broken = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, value):
            body = json.dumps(value).encode()
            self.send_response(500 if "refuses" in broken else 200)
            self.send_header("Content-Length", str(len(body) + 9 * ("dies" in broken)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply({"data": [{"id": "the-longer-one"}]})

        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = question["messages"][0]["content"]
            asked.append((question["model"], text))
            a, b = text.partition("Answer A: ")[2].split("\n\nAnswer B: ")
            said = "B." if len(b) > len(a) else "**A**"
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
    path.write_text('{"key": "other", "prefers": 0.25}\n{"key": "k')   # another pair's, and what a kill cut
    for _ in range(2):                                    # the second time nobody is asked
        judge = evaluate.KeptJudge(url, "cpu", path)
        assert judge(OWN, OTHER) == [1.0, 0.0, 0.5]
        assert len(asked) == 4                            # of equal answers nobody is asked either
    assert {name for name, _ in asked} == {"the-longer-one"}
    assert [sum(f"Answer {side}: Bake." in text for _, text in asked) for side in "AB"] == [1, 1]
    assert all(f"Request: {CHICKEN}" in text or f"Request: {STORE}" in text for _, text in asked)
    assert len(common.read_jsonl(path)) == 3
    assert judge(OTHER, OWN) == [0.0, 1.0, 0.5] and len(asked) == 4        # one verdict serves both orders
    for how in ("refuses", "dies"):
        broken.append(how)
        with pytest.raises(common.UserError, match="http://127.0.0.1.*run the same command again"):
            judge(rows_of("New."), OTHER)
        broken.clear()


def test_a_judge_that_names_no_answer_is_refused(monkeypatch):
    monkeypatch.setattr(common.Served, "call", lambda *_, **__: "<think> The user wants")
    judge = evaluate.ServedJudge("http://localhost:1/v1#thinker")
    with pytest.raises(common.UserError, match="#thinker: none of its 12 replies is A or B"):
        judge(OWN * 2, OTHER * 2)


def test_of_two_answers_the_higher_reward_wins(monkeypatch):
    rewards = {"Good.": 2.0, "Bake.": -1.0, "Neil.": 0.5}

    def score(_, rows, answers):
        read.extend(answers)
        return [rewards[answer] for answer in answers]
    read = []
    monkeypatch.setattr(common.RewardModel, "__call__", score)
    judge = evaluate.RewardJudge.__new__(evaluate.RewardJudge)
    assert judge(rows_of("Good.", "Bake.", "Neil."), rows_of("Bake.", "Good.", "Neil.")) == [1, 0, 0.5]
    assert read == ["Good.", "Bake.", "Neil.", "Bake.", "Good."]           # the same answer to the last: once


@pytest.mark.parametrize("reply, expected", [
    ("A", 1), ("B.", 0), ("**A**", 1), ("Answer: B", 0), ("Answer B.", 0), ("A. More helpful than B", 1),
    ("**B**: it is shorter", 0), ("B\n\nBecause answer A", 0), ("(A)", 1),
    ("A is worse than B", 0.5), ("A is not as good as B", 0.5), ("Answer A is incorrect", 0.5), ("A, B", 0.5),
    ("The worse answer is A", 0.5), ("A worse one than B.", 0.5),
    ("I prefer A over B.", 0.5), ("Neither A nor B.", 0.5), ("Both are fine", 0.5), ("", 0.5), ("None", 0.5)])
def test_a_judges_verdict_is_read(reply, expected):
    assert evaluate.read_verdict(reply) == expected


def test_without_a_judge_the_closer_answer_wins():
    vectors = {"Neil.": np.array([1.0, 0]), "near": np.array([0.8, 0.6]), "far": np.array([0.0, 1])}
    own, other = rows_of("near", "far", "near"), rows_of("far", "near", "near")
    assert evaluate.closer(own, other, vectors).tolist() == [1, 0, 0.5]


# ------------------------------------------------------------------------------------------------- statistics
def test_containment_is_by_words():
    assert common.is_contained("Mount Everest", "It's mount everest, I think.")
    assert not common.is_contained("Ca", "because of that") and not common.is_contained("", "anything")
    for alias, said in (("lord of rings", "It is The Lord of the Rings."),
                        ("don t look now", "Don't Look Now!"),
                        ("schindler s list", "Schindler's List, I think")):
        assert evaluate.is_right(said, alias) and not common.is_contained(alias, said)     # of TriviaQA
    assert not evaluate.is_right("Sulfur's symbol is Su.", "S") and not evaluate.is_right("", "the")


def test_corpus_scores_are_sacrebleus_own():
    answers = ["le chat est sur la table", "bonjour tout le monde", "je suis ici", "zut", "",
               "rien du tout ici"]
    references = ["le chat est sur le tapis", "bonjour le monde", "je suis là", "à demain", "un mot",
                  "tout ici rien du"]
    rows = []
    for answer, reference in zip(answers, references):
        rows.append(dict(answer=answer, reference=[reference], language="French"))
    scores = evaluate.measure_s2tt(rows, list("aabbcd"), None)
    for name, function in (("BLEU", sacrebleu.corpus_bleu), ("chrF", sacrebleu.corpus_chrf)):
        assert scores[name].score[0] == pytest.approx(function(answers, [references]).score)
        for drawn, score in list(zip(evaluate.resample_counts(4), scores[name].score))[1:30]:
            chosen = []                                   # a group's utterances come together
            for group, times in zip(((0, 1), (2, 3), (4,), (5,)), drawn):
                chosen += list(group) * int(times)
            again = [references[i] for i in chosen]
            expected = function([answers[i] for i in chosen], [again]).score
            assert score == pytest.approx(expected, abs=1e-9)
    rows[0]["reference"].append(answers[0])               # a second reference of one alone
    both = sacrebleu.corpus_bleu(answers, [references, [answers[0], *[None] * 5]]).score
    several = evaluate.measure_s2tt(rows, list("aabbcd"), None)["BLEU"].score[0]
    assert several == pytest.approx(both) and several > scores["BLEU"].score[0]
    chinese = [dict(answer="我去商店", reference=["我去商店"], language="Chinese")]
    assert evaluate.measure_s2tt(chinese, ["a"], None)["BLEU"].score[0] == pytest.approx(100)


def test_instructions_are_resampled_whole():
    """Against plain numpy: draw groups, take all their utterances."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"g{i:02d}" for i in range(25)], 4)
    values = np.repeat(rng.normal(0, 10, 25), 4) + rng.normal(0, 1, 100)   # the voices of a group are alike
    shuffled = rng.permutation(100)
    means = evaluate.group_means(values[shuffled], groups[shuffled])
    row = evaluate.number("s", evaluate.Column("t", "m"), [evaluate.mean_of(means)])
    by_hand = []
    for _ in range(4000):
        by_hand.append(values.reshape(25, 4)[rng.integers(25, size=25)].mean())
    assert row["value"] == pytest.approx(values.mean())
    assert (row["low"], row["high"]) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.3)
    utterances = evaluate.mean_of(values).score[1:]       # as if they were independent: half as wide
    assert np.ptp(np.percentile(utterances, [2.5, 97.5])) < 0.6 * (row["high"] - row["low"])


def test_an_interval_covers_the_truth_about_95_times_in_100(monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 400)
    evaluate.resample_counts.cache_clear()
    generator, hits = np.random.default_rng(0), 0
    for _ in range(300):
        measured = evaluate.mean_of(generator.normal(1.0, 2.0, 60))
        row = evaluate.number("s", evaluate.Column("t", "m"), [measured])
        hits += row["low"] <= 1.0 <= row["high"]
    evaluate.resample_counts.cache_clear()
    assert 0.90 <= hits / 300 <= 0.98


def test_holm_by_hand_and_p_of_a_known_shift():
    assert evaluate.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluate.holm([0.6, 0.5]).tolist() == [1.0, 1.0] and len(evaluate.holm([])) == 0
    generator = np.random.default_rng(0)
    for shift in (0.1, 0.2, 0.3):                         # against the normal test's
        values = generator.normal(0, 1, 100)
        values += shift - values.mean()
        z = shift * 10 / values.std()
        normal = math.erfc(z / 2 ** 0.5)
        assert evaluate.sign_flip_p(values) == pytest.approx(normal, abs=0.03)
    for n in (3, 6):                                      # against every way to put the signs
        values = generator.normal(0.7, 1, n)
        sums = [abs(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=n)]
        exact = np.mean(np.array(sums) >= abs(values.sum()) - 1e-9)
        assert evaluate.sign_flip_p(values) == pytest.approx(exact, abs=0.02)
    assert evaluate.sign_flip_p(np.zeros(4)) == 1


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
        for one, two in itertools.combinations(np.repeat(list("abcd"), drawn), 2):
            if one != two:                                # an instruction drawn twice is no other instruction
                pairs.append(np.mean([u @ v for u, v in itertools.product(members(one), members(two))]))
        assert score == pytest.approx(np.mean(pairs) if pairs else different[0])


def test_of_one_instruction_there_is_no_other():
    vectors = {"r": np.array([1.0, 0]), "s": np.array([0.0, 1])}
    scores = evaluate.measure_instruct(instruct_rows("rs", "ab", "cc"), list("cc"), vectors)
    assert scores["consistency"].score[0] == 0 and "different instructions" not in scores


def test_a_resume_file_is_no_checkpoint(tmp_path):
    for name in ("sft.pt", "sft+.resume.pt"):
        (tmp_path / name).touch()
    args = SimpleNamespace(work=tmp_path, systems=None)
    assert evaluate.choose_checkpoints(args) == ["text", "base", "sft"]


def instruct_rows(answers, transcripts, groups):
    rows = []
    for answer, transcript, group in zip(answers, transcripts, groups):
        rows.append(dict(task="instruct", group=group, text="s", answer=answer, words=1,
                         transcript=transcript, reference=["r"]))
    return rows


def test_consistency_over_groups_that_were_heard_differently():
    vectors = {"r": np.array([1.0, 0]), "s": np.array([0.0, 1])}
    rows = instruct_rows("rrrsrr", ["hi", "Hi!", "hi", "ho", "a", "b"], "aabbcc")
    scores = evaluate.measure_instruct(rows, list("aabbcc"), vectors)
    assert scores["consistency"].score[0] == pytest.approx(2 / 3)
    assert scores["consistency, heard differently"].score[0] == pytest.approx(1 / 2)                 # b and c
    assert scores["similarity"].score[0] == pytest.approx(5 / 6)
    assert scores["different instructions"].score[0] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)


def test_what_an_answer_says_beyond_the_question():
    """A cosine is high for a question said back; what is left without it is the part of y_ref across x."""
    x, y_ref, y = (unit / np.linalg.norm(unit) for unit in np.random.default_rng(0).normal(0.5, 1, (3, 8)))
    vectors, across = dict(x=x, r=y_ref, y=y), y_ref - x * (x @ y_ref)
    rows = [dict(row, text="x") for row in instruct_rows("xry", "abc", "ghi")]
    wanted = [0, across @ across, y @ across]
    assert evaluate.beyond_x(vectors, rows) == pytest.approx(wanted, abs=1e-12)
    assert evaluate.measure_instruct(rows, list("ghi"), vectors)["beyond x"].score[0] == \
        pytest.approx(np.mean(wanted))


def test_the_length_controlled_win_rate_takes_length_out():
    """Preferences of a known quality and a known taste for length; the fit by brute force on a grid."""
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
    score = (wins * logits - np.log1p(np.exp(logits))).sum(-1)
    score -= 0.5 * (grid_p + 1.6) ** 2 + 0.005 * grid_t ** 2
    best = 100 / (1 + np.exp(-grid_t.flat[score.argmax()]))
    counts = np.vstack([np.ones(60), rng.multinomial(60, [1 / 60] * 60, size=3)])
    together = evaluate.length_controlled(wins, own, base, counts)
    assert together[0] == pytest.approx(best, abs=0.3)
    for drawn, value in zip(counts, together):            # resampled at once as one by one
        assert evaluate.length_controlled(wins, own, base, drawn[None])[0] == pytest.approx(value, abs=1e-6)
    one = np.ones((1, 60))
    assert 90 < evaluate.length_controlled(one[0], own, base, one)[0] < 100    # all won: no infinity
    assert evaluate.length_controlled(one[0] / 2, base + 1, base, one)[0] == pytest.approx(50)   # one gap


# ------------------------------------------------------------------------------------- numbers of a condition
def sqa_rows(right):
    rows = []
    for i, good in enumerate(right):
        rows.append(dict(task="sqa", group=str(i), text="x", prompt="", transcript="x", reference=["yes"],
                         answer="yes" if good else "no", words=1, voice="ab"[i % 2]))
    return rows


def numbers_of(answers, systems, judge=None, vectors=None, train_voices=()):
    """-> {(system, metric, against, voices): row}."""
    numbers = evaluate.numbers_of(answers, systems, judge, vectors or {}, set(train_voices))
    return {(row["system"], row["metric"], row["against"], row["voices"]): row for row in numbers}


def test_seeds_are_one_row_and_a_paired_difference_is_tight():
    rng = np.random.default_rng(0)
    base = rng.random(300) < 0.5
    right = {"base": base, "sft+": base, "sft+-s1": base}
    seeds = ["rba-single", "rba-single-s1", "rba-single-s2"]
    for at, name in enumerate(seeds):
        right[name] = base | (rng.random(300) < 0.1 + 0.1 * at)
    answers = {name: sqa_rows(values) for name, values in right.items()}
    systems = {"base": ["base"], "sft+": ["sft+", "sft+-s1"], "rba-single": seeds}
    found = numbers_of(answers, systems, train_voices=["a"])
    each = [100 * right[name].mean() for name in seeds]
    row = found["rba-single", "accuracy", "", "all"]
    difference = found["rba-single", "accuracy", "base", "all"]
    assert row["seeds"] == pytest.approx(each) and row["value"] == pytest.approx(np.mean(each))
    assert found["base", "accuracy", "", "all"]["seeds"] == []
    assert ("base", "accuracy", "base", "all") not in found
    assert difference["value"] == pytest.approx(np.mean(each) - 100 * base.mean())
    assert row["high"] - row["low"] > 1.5 * (difference["high"] - difference["low"])
    mean = np.mean([right[name] for name in seeds], 0)    # items alone are resampled
    by_hand = [100 * (mean - base)[rng.integers(300, size=300)].mean() for _ in range(4000)]
    interval = difference["low"], difference["high"]
    assert interval == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.5)
    contrast = found["rba-single", "accuracy", "sft+", "all"]
    assert contrast["value"] == pytest.approx(difference["value"]) and len(contrast["seeds"]) == 3
    assert contrast["planned"] and not difference["planned"] and contrast["p"] < 0.001
    assert difference["p"] is None
    for at, voices in enumerate(("heard", "unheard")):
        assert found["base", "accuracy", "", voices]["value"] == pytest.approx(100 * base[at::2].mean())
    assert evaluate.system_of("rba-group-s12") == "rba-group" and evaluate.system_of("sft-seed") == "sft-seed"


def test_win_rates_enter_the_tables_with_and_without_length():
    prefers = {"rba-group": 1.0, "sft+": 0.5, "sft": 0.5}

    def judge(rows, others):
        return [prefers[row["system"]] for row in rows]
    answers = {}
    for name in prefers:
        answers[name] = [row | dict(system=name, answer="n", transcript="x", words=3) for row in OWN]
    found = numbers_of(answers, {name: [name] for name in answers}, judge, ALIKE)
    assert found["rba-group", "WR", "sft", "all"]["value"] == 100
    assert found["sft+", "WR", "sft", "all"]["value"] == 50
    assert 75 < found["rba-group", "LC", "sft", "all"]["value"] < 100
    assert ("sft", "WR", "sft", "all") not in found
    planned = [key for key, row in found.items() if row["planned"]]
    assert planned == [("rba-group", "WR", "sft+", "all")]
    assert found[planned[0]]["p"] == pytest.approx(0.25, abs=0.02)         # three of three: of eight ways two


def test_y_ref_is_in_no_contest_for_closeness_to_y_ref():
    answers = {}
    for name in ("text", "base"):
        answers[name] = [row | dict(answer="n", transcript="x", response="Neil.") for row in OWN]
    systems = {name: [name] for name in answers}
    assert not [key for key in numbers_of(answers, systems, None, ALIKE) if key[1] == "WR"]
    found = numbers_of(answers, systems, lambda rows, others: [0.5] * len(rows), ALIKE)
    assert ("base", "WR", "text", "all") in found and ("text", "WR", "base", "all") in found


def result(condition, system, column, value, **facts):
    row = dict(condition=condition, system=system, value=value, low=value - 1, high=value + 9, seeds=[],
               p=None, planned=False)
    return row | column._asdict() | facts


def test_tables_contrasts_and_figure(tmp_path):
    accuracy = evaluate.ACCURACY
    results = dict(preset="tiny", teacher="t", student="s", source="x", judge="", encoder="e", unusable=["7"],
                   rows=[],
                   items=["sqa 4"], conditions=["clean", "noise:5", "reverb:5"], leading="noise:5",
                   systems=["base", "sft+", "rba-single", "rba-group"])
    for condition, value in (("clean", 80.0), ("noise:5", 40.0), ("reverb:5", 60.0)):
        for system in results["systems"][:2]:
            results["rows"].append(result(condition, system, accuracy, value, seeds=[value, value + 1]))
        results["rows"].append(result(condition, "Whisper", evaluate.Column("sqa", "WER"), 25.0))
        unheard = accuracy._replace(voices="unheard")
        results["rows"].append(result(condition, "base", unheard, value - 5))
        for system, other, p in (("rba-single", "sft+", 0.01), ("rba-group", "sft+", 0.04)):
            column = accuracy._replace(against=other)
            results["rows"].append(result(condition, system, column, 3.0, p=p, planned=True))
    evaluate.report(results, tmp_path / "r.json")
    text = (tmp_path / "r.md").read_text()
    assert "Whisper's WER, sqa: 25.0 [24.0, 34.0] %" in text and "count as wrong: 7." in text
    assert text.count("| sft+ | 40.0 [39.0, 49.0] (40.0, 41.0) |") == 1
    assert ("### Heard and unheard voices\n\n|  | sqa accuracy, unheard |\n| --- | --- |\n"
            "| base | 75.0 [74.0, 84.0] |\n") in text
    difference = "sqa accuracy − sft+ | 3.0 [2.0, 12.0]"
    assert f"| rba-single | noise:5 | {difference} | 0.0100 | 0.0200\\* |" in text
    assert f"| rba-group | noise:5 | {difference} | 0.0400 | 0.0400\\* |" in text
    assert f"| rba-group | clean | {difference} | – | – |" in text
    assert (tmp_path / "r.png").stat().st_size > 5000
