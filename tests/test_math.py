"""The method's formulas against independent references: brute force, hand-written float64 loops, torch, sacrebleu."""
import contextlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import stage

import common

sft, rl, evaluate, synthesize = map(stage, ("02_sft_warmup", "03_rba_rl", "04_evaluate", "01_synthesize"))
NAN = math.nan


# --------------------------------------------------------------------------------------------- advantage and loss
def reference_sequence_advantages(rewards, ended, weights, greedy=None):
    n, k = len(ended), len(ended[0])
    out = [[0.0] * k for _ in range(n)]
    for name, weight in weights.items():
        r = rewards[name]
        takes = [[ended[i][j] and not math.isnan(r[i][j]) for j in range(k)] for i in range(n)]
        if greedy is None:
            takes = [row if sum(row) >= 2 else [False] * k for row in takes]
        used = [r[i][j] for i in range(n) for j in range(k) if takes[i][j]]
        if len(used) < 1:
            continue
        mean = sum(used) / len(used)
        sigma = math.sqrt(sum((v - mean) ** 2 for v in used) / len(used))
        if sigma < 1e-8:
            continue
        for i in range(n):
            for j in range(k):
                if takes[i][j]:
                    others = [r[i][m] for m in range(k) if m != j and takes[i][m]]
                    b = sum(others) / len(others) if greedy is None else greedy[name][i]
                    out[i][j] += weight * (r[i][j] - b) / sigma
    return out


@pytest.mark.parametrize("with_greedy", [False, True])
def test_sequence_advantages_with_dropped_samples_and_missing_rewards(with_greedy):
    rewards = {"semantic": [[.2, .5, .9, .1], [.3, .3, .7, .8], [.5, .4, .1, .6], [.2, .2, .2, .2]],
               "task": [[1., 0., .5, .5], [NAN] * 4, [0., 1., 1., 0.], [1., 1., 1., 0.]]}
    ended = [[True, True, False, True], [True] * 4, [False, False, True, False], [True] * 4]
    weights, greedy = {"semantic": 1.0, "task": 0.5}, {"semantic": [.4, .2, .3, .2], "task": [0., NAN, 1., 1.]}
    tensors = {name: torch.tensor(r, dtype=torch.float64) for name, r in rewards.items()}
    base = {name: torch.tensor(r, dtype=torch.float64) for name, r in greedy.items()} if with_greedy else None
    got, counts = rl.sequence_advantages(tensors, torch.tensor(ended), weights, base)
    wanted = reference_sequence_advantages(rewards, ended, weights, greedy if with_greedy else None)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    assert got[~torch.tensor(ended)].abs().max() == 0
    if not with_greedy:
        assert counts["semantic"] == (1, 1)               # the third group has one sample left, the fourth no spread
        assert got.sum(1).abs().max() < 1e-12             # leave-one-out advantages of a group sum to 0


def test_rewards_without_spread_or_samples_give_no_advantage():
    flat = {"semantic": torch.full((2, 3), 0.5, dtype=torch.float64)}
    assert rl.sequence_advantages(flat, torch.ones(2, 3, dtype=torch.bool), {"semantic": 1.0})[0].abs().max() == 0
    got, counts = rl.sequence_advantages(flat, torch.zeros(2, 3, dtype=torch.bool), {"semantic": 1.0})
    assert got.abs().max() == 0 and counts["semantic"] == (2, 0)


def test_token_advantages_take_k1_to_the_end_of_the_sequence():
    generator = torch.Generator().manual_seed(0)
    lp, teacher, reference = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    lp.requires_grad_()
    got = rl.token_advantages(0.7, lp, teacher, reference, token_weight=0.3, beta=0.2)
    wanted = [0.7 + 0.3 * float((teacher - lp.detach())[t]) - 0.2 * sum(float((lp.detach() - reference)[u]) for u in range(t, 7)) for t in range(7)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    assert not got.requires_grad


def test_policy_loss_adds_up_over_micro_batches():
    generator = torch.Generator().manual_seed(0)
    lps = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 5, 2, 9)]
    advantages = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (3, 5, 2, 9)]
    wanted = -sum(float(a * b) for x, y in zip(advantages, lps) for a, b in zip(x, y)) / (2 * 2 * 11)
    whole = rl.policy_loss(lps, advantages, 2, 2, 11)
    parts = rl.policy_loss(lps[:1], advantages[:1], 2, 2, 11) + rl.policy_loss(lps[1:], advantages[1:], 2, 2, 11)
    assert float(whole) == pytest.approx(wanted) and float(parts) == pytest.approx(wanted)


def test_policy_gradient_is_the_expected_one_on_an_enumerable_policy():
    """With loo and a constant divisor the expected gradient is that of -E[R] / (N L sigma): checked by enumerating all
    pairs of one-token answers of a softmax over three."""
    logits, reward = torch.tensor([.3, -.2, .5], dtype=torch.float64, requires_grad=True), torch.tensor([1., 0., .4], dtype=torch.float64)
    p = logits.softmax(0)
    total = 0.0
    for a, b in itertools.product(range(3), repeat=2):
        r = reward[[a, b]]
        centred = torch.stack([r[0] - r[1], r[1] - r[0]])
        lp = [logits.log_softmax(0)[[i]] for i in (a, b)]
        total = total + float(p[a] * p[b]) * rl.policy_loss(lp, [c[None] for c in centred], 1, 2, 1)
    got, = torch.autograd.grad(total, logits)
    wanted, = torch.autograd.grad(-(logits.softmax(0) * reward).sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_kd_matches_torchs_own_kl_where_padded_vocabularies_differ():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(4, 9, generator=generator), torch.randn(4, 7, generator=generator)
    wanted = F.kl_div(student.log_softmax(-1), teacher[:, :7].softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(sft.kl_rows(teacher, student), wanted, rtol=1e-4, atol=1e-5)


def test_chunks_give_the_same_values_and_gradients():
    x, y, weight = torch.randn(11, 3, requires_grad=True), torch.randn(11, 3), torch.randn(11)
    whole, = torch.autograd.grad(((x ** 3 * y).sum(-1) * weight).sum(), x)
    for size in (1, 4, 11, 50):
        chunked = common.by_chunks(lambda rows, others: (rows ** 3 * others).sum(-1), x, y, size=size)
        torch.testing.assert_close(chunked, (x ** 3 * y).sum(-1))
        torch.testing.assert_close(torch.autograd.grad((chunked * weight).sum(), x)[0], whole)
    with torch.no_grad():
        torch.testing.assert_close(common.by_chunks(lambda rows: (rows ** 3).sum(-1), x, size=4), (x ** 3).sum(-1))


def test_token_batches_hold_all_within_the_limit():
    generator = np.random.default_rng(0)
    for limit in (1, 7, 50, 1000):
        lengths = generator.integers(1, 30, 23).tolist()
        batches = common.token_batches(lengths, limit)
        assert [i for batch in batches for i in batch] == list(range(23))
        assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= limit for batch in batches)
        for batch, after in zip(batches, batches[1:]):    # none could have held one more
            assert max(lengths[i] for i in [*batch, after[0]]) * (len(batch) + 1) > limit
    assert common.token_batches([], 5) == []


# ------------------------------------------------------------------------------------------- rewards and metrics
def test_containment_is_by_words_and_f1_by_hand():
    assert evaluate.is_contained("Mount Everest", "It's mount everest, I think.")
    assert not evaluate.is_contained("Ca", "because of that") and not evaluate.is_contained("", "anything")
    assert common.token_f1("the red house", "a red car") == pytest.approx(2 * 1 / 6)
    assert common.token_f1("Paris", "Paris") == 1 and common.token_f1("", "Paris") == 0


def test_corpus_scores_are_sacrebleus_own():
    answers = ["le chat est sur la table", "bonjour tout le monde", "je suis ici"]
    references = [["le chat est sur le tapis"], ["bonjour le monde"], ["je suis là"]]
    answers, references = answers + ["zut", "", "rien du tout ici"], references + [["à demain"], ["un mot"], ["tout ici rien du"]]
    for metric, score, function in ((sacrebleu.BLEU(), evaluate.bleu, sacrebleu.corpus_bleu), (sacrebleu.CHRF(), evaluate.chrf, sacrebleu.corpus_chrf)):
        statistics = evaluate.corpus_statistics(metric, answers, references)
        value, low, high = common.bootstrap(statistics, score, resamples=50)
        assert value == pytest.approx(function(answers, [[r[0] for r in references]]).score)
        assert low <= value <= high
        draws = np.random.default_rng(0).multinomial(6, [1 / 6] * 6, size=300)
        draws = np.concatenate([draws, np.eye(6, dtype=int), 2 * np.eye(6, dtype=int)])       # single items too: no match of some order
        got = score(draws @ statistics, 6)
        for counts, own in zip(draws, got):
            rows = [i for i, times in enumerate(counts) for _ in range(times)]
            expected = function([answers[i] for i in rows], [[references[i][0] for i in rows]]).score
            assert own == pytest.approx(expected, abs=1e-9)


def test_bootstrap_of_a_thousand_items_and_six_systems_is_one_matrix_product():
    statistics = np.random.default_rng(0).normal(0, 1, (1000, 6))
    counts = np.random.default_rng(5).multinomial(1000, np.full(1000, 1 / 1000), size=10_000)
    for system in range(6):
        _, low, high = common.bootstrap(statistics[:, system:system + 1], seed=5)
        by_hand = np.percentile([row @ statistics[:, system] / 1000 for row in counts[:500]], [2.5, 97.5])
        assert (low, high) == pytest.approx(by_hand, abs=0.02) and high - low == pytest.approx(2 * 1.96 / 1000 ** 0.5, rel=0.1)


def test_bootstrap_covers_the_truth_about_95_times_in_100():
    generator, hits = np.random.default_rng(0), 0
    for trial in range(200):
        low, high = common.bootstrap(generator.normal(1.0, 2.0, (60, 1)), resamples=400, seed=trial)[1:]
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 200 <= 0.985


def test_a_paired_difference_is_tighter_than_its_parts():
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 10, 80)
    measured = {"clean": {name: [{("sqa", "accuracy"): ((hard + shift + generator.normal(0, .5, 80))[:, None], evaluate.mean)}]
                          for name, shift in (("text", 8.0), ("sft", 0.0), ("rba", 2.0))}}
    rows = {row["system"]: row for row in evaluate.compare(measured)}
    assert rows["rba"]["separable"] and 1.5 < rows["rba"]["difference"] < 2.5
    assert rows["rba"]["high"] - rows["rba"]["low"] > 4 * (rows["rba"]["difference_high"] - rows["rba"]["difference_low"])
    assert rows["rba"]["gap_recovered"] == pytest.approx(0.25, abs=.06) and "gap_recovered" not in rows["text"]


def test_seeds_of_a_system_are_one_row_with_their_mean():
    """Against plain numpy: value, paired difference, and its interval, items and seeds resampled one resample at a time."""
    generator = np.random.default_rng(1)
    answers = ["the cat sat on the mat", "a dog ran far away", "it rained all day long", "birds sing in the morning"]
    base, seeds = generator.normal(50, 10, 60), generator.normal(52, 10, (3, 60))
    metric = sacrebleu.CHRF()
    corpora = [evaluate.corpus_statistics(metric, [" ".join(generator.permutation(a.split())) for a in answers], [[a] for a in answers])
               for _ in range(3)]
    measured = {"clean": {"sft": [{("sqa", "accuracy"): (base[:, None], evaluate.mean)}],
                          "rba": [{("sqa", "accuracy"): (own[:, None], evaluate.mean), ("s2tt", "chrF"): (corpus, evaluate.chrf)}
                                  for own, corpus in zip(seeds, corpora)]}}
    rows = {(row["system"], row["metric"]): row for row in evaluate.compare(measured)}
    row = rows["rba", "accuracy"]
    assert row["value"] == pytest.approx(seeds.mean()) and row["seeds"] == pytest.approx(seeds.mean(1)) and "seeds" not in rows["sft", "accuracy"]
    assert row["difference"] == pytest.approx(seeds.mean() - base.mean())
    differences = []
    for _ in range(4000):
        items, drawn = generator.integers(60, size=60), generator.integers(3, size=3)
        own = seeds[:, items].mean(1)
        differences.append(own.mean() + (own[drawn].mean() - own.mean()) * 1.5 ** 0.5 - base[items].mean())
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=0.4)
    assert row["difference_high"] - row["difference_low"] > np.diff(common.bootstrap((seeds.mean(0) - base)[:, None])[1:])
    own = [float(evaluate.chrf(corpus.sum(0), 4)) for corpus in corpora]
    assert rows["rba", "chrF"]["seeds"] == pytest.approx(own) and rows["rba", "chrF"]["value"] == pytest.approx(np.mean(own))
    found = {(r["system"], r["base"]): r for r in evaluate.between({"clean": {"text": measured["clean"]["sft"], **measured["clean"], "kd": [
        {("sqa", "accuracy"): (base[:, None] + 5, evaluate.mean)}]}})}
    assert found.keys() == {(a, b) for a in ("sft", "rba", "kd") for b in ("sft", "rba", "kd") if a != b}
    assert [found["kd", "sft"][key] for key in ("difference", "low", "high")] == pytest.approx([5, 5, 5]) and found["sft", "kd"]["difference"] == pytest.approx(-5)
    assert [found["rba", "sft"][key] for key in ("difference", "low", "high")] == [row[key] for key in ("difference", "difference_low", "difference_high")]
    lines = []
    evaluate.between_table(list(found.values()), lines)
    assert "| kd | +5.0* | " in lines[-1] and lines[-1].endswith("|  |")
    assert common.without_seed("rba+opd-s12") == "rba+opd" and common.without_seed("sft-seed") == "sft-seed"


def test_wins_are_over_all_pairs_of_seeds_and_daggers_know_the_judge():
    """By counting: the system wins against one of the two seeds of sft."""
    judged = ("instruct", "log π_T")
    rows = {name: [{judged: (np.full((4, 1), value), evaluate.mean), ("instruct", "tokens"): (np.ones((4, 1)), evaluate.mean)} for value in values]
            for name, values in (("sft", (-0.9, -3.0)), ("rba", (-1.0, -1.0)), ("kd", (-0.5, -3.0)))}
    found = {row["system"]: row for row in evaluate.compare({"clean": rows}) if row["metric"] == "wins"}
    assert found["rba"]["value"] == 50 and found["kd"]["value"] == pytest.approx((100 + 25) / 2) and found["kd"]["seeds"] == [100, 25]
    history = [dict(objective="kd"), dict(objective="rl", rewards={"rm": 1.0})]
    assert evaluate.trained_on(history, True) == ["judge", "rm", "token"] and evaluate.trained_on(history[1:], False) == ["rm"]
    assert evaluate.trained_on([dict(objective="sft")], True) == []


def test_an_item_twice_in_a_batch_gets_other_samples(monkeypatch):
    monkeypatch.setattr(common, "sample", lambda llm, prompts, end, most, seeds, temperature: seeds)
    monkeypatch.setattr(common, "autocast", lambda llm: contextlib.nullcontext())
    model = SimpleNamespace(llm=None, end_id=0, speech_prompts=lambda heard, prompts: prompts)
    args = SimpleNamespace(seed=0, k=2, max_new=4, temperature=1.0, baseline="loo")
    seeds, _ = rl.rollout(model, [dict(id="a", prompt=""), dict(id="b", prompt=""), dict(id="a", prompt="")], None, args, "rba", 3, [0, 0, 1])
    assert len({seed for row in seeds for seed in row}) == 6
    assert seeds[0] == [common.derive_seed(0, "rba", 3, "a", k) for k in range(2)]     # as without a repetition


def test_learning_rate_and_batches():
    rates = [common.learning_rate(step, 40, 1e-3) for step in range(40)]
    assert rates[0] == pytest.approx(2.5e-4) and max(rates) < 1e-3 + 1e-12 and rates[-1] < 1e-5
    seen = [i for step in range(7) for i in common.batch_at(14, 4, step, "seed")]
    assert sorted(seen[:14]) == list(range(14)) and sorted(seen[14:28]) == list(range(14))
    assert seen[:14] != seen[14:28] and common.batch_at(14, 4, 3, "seed") == seen[12:16]


# --------------------------------------------------------------------------------------------------- text filters
@pytest.mark.parametrize("text, good", [
    ("What is the capital of France?", True), ("I'd like 2 tickets, please.", True), ("See https://a.b for more", False),
    ("def f(): return", False), ("- one\n- two", False), ("| a | b |", False), ("**bold** words here", False),
    ("Use `ls` to list", False), ("Call 5551234567 now", False)])
def test_speakable(text, good):
    assert synthesize.is_speakable(text) == good


def test_language():
    assert synthesize.is_english("Can you tell me what the weather is like?")
    assert not synthesize.is_english("Je voudrais un café") and not synthesize.is_english("")


def test_near_duplicates_against_all_pairs():
    texts = ["What is the capital of France?", "what is the capital of france", "What is the capital of Spain?",
             "Tell me a story about a dog.", "Tell me a story about a big dog.", "Tell me a story about a dog, please."] * 2

    def grams(text):
        words = ["<", *"".join(c if c.isalnum() else " " for c in text.lower()).split(), ">"]
        return set(zip(words, words[1:]))
    kept = []
    unlike = synthesize.Unlike()
    for i, text in enumerate(texts):
        twin = unlike.twin(text)
        close = [j for j in kept if len(grams(text) & grams(texts[j])) / len(grams(text) | grams(texts[j])) >= 0.7]
        assert (twin is not None) == bool(close) and (twin is None or kept[twin] in close)
        if twin is None:
            kept.append(i)
    assert 1 < len(kept) < 6


@pytest.mark.parametrize("continuation, name", [
    (" Paris.", "Paris"), (": the Paris, of course", "Paris"), (" France.", ""), (" Rome.", ""), (" a b c d e.", "")])
def test_short_answer(continuation, name):
    assert synthesize.short_answer("What is the capital of France?", "The capital of France is Paris.", continuation) == name
