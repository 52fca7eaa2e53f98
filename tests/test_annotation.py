"""A person's session without a browser: its questions, its records, what it survives."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from lit_align.annotate_page import annotate
from lit_align.annotation import AnnotationSession, plan_questions, read_records, summarise
from lit_align.candidates import Candidates
from lit_align.data.preference_records import append_record, check_record, pair_record


def prompts(count, images=2):
    return [
        Candidates(
            f"prompt {n}", {"number": n},
            [{"uid": f"{n}-{k}", "path": f"images/{n}_{k}.png"} for k in range(images)],
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def opened():
    """Yield a function that opens sessions, and closes the one before, as a new process would."""
    sessions = []

    def session(count=3, images=2, repeat_fraction=0.0, annotator="ada", folder="."):
        if sessions:
            sessions[-1].close()
        Path(folder).mkdir(exist_ok=True)
        found = prompts(count, images)
        sessions.append(AnnotationSession(found, folder, annotator, repeat_fraction, seed=1))
        return sessions[-1]

    yield session
    sessions[-1].close()


def records():
    return [json.loads(line) for line in Path("preferences.jsonl").read_text().splitlines()]


def place_of(session, item):
    return session.question.shown.index(item)


def test_every_prompt_is_asked_once_in_an_order_of_the_persons_own():
    found = prompts(200)
    ada = plan_questions(found, "ada", 0.0, seed=1)
    assert [question.candidates for question in ada] == found
    assert plan_questions(found, "ada", 0.0, seed=1) == ada
    swapped = sum(question.shown == [1, 0] for question in ada)
    assert 70 < swapped < 130  # four standard deviations of fair places are 28
    for other in (plan_questions(found, "bob", 0.0, seed=1), plan_questions(found, "ada", 0.0, 2)):
        assert [question.shown for question in other] != [question.shown for question in ada]


@pytest.mark.parametrize(("count", "share", "gap"), [(10, 0.1, 5), (100, 0.2, 10), (4, 1.0, 1)])
def test_a_share_is_asked_again_later_with_the_places_swapped(count, share, gap):
    questions = plan_questions(prompts(count, images=3), "ada", share, seed=1)
    assert len(questions) == count + round(share * count)
    places = {question.id: place for place, question in enumerate(questions)}
    assert len(places) == len(questions)
    for place, question in enumerate(questions):
        if question.repeat_of is not None:
            first = questions[places[question.repeat_of]]
            assert question.shown == first.shown[::-1]
            assert question.candidates is first.candidates
            assert place - places[question.repeat_of] >= gap
    with pytest.raises(ValueError, match=r"`repeat_fraction` must be in \[0, 1\], got 2"):
        plan_questions(prompts(1), "ada", 2)


def test_pairs_are_written_as_they_are_chosen(opened):
    session = opened(count=4)
    for answer in (0, 1):
        session.choose(place_of(session, answer))
    session.tie()
    session.skip()
    assert session.question is None
    assert session.progress == (4, 4)
    for record in records():
        check_record(record)
    first, second, tied, skipped = records()
    assert [first["label"], second["label"], tied["label"]] == [[1, 0], [0, 1], [0.5, 0.5]]
    assert skipped["kind"] == "invalid"
    assert skipped["metadata"]["skipped"]
    assert first["annotator"] == "ada"
    assert first["pair_id"] == "0-0|0-1"
    assert first["metadata"]["shown"] == session.questions[0].shown
    assert first["metadata"]["prompt"] == {"number": 0}
    assert first["created_at"].endswith("+00:00")


def test_of_several_the_best_and_the_worst_are_named(opened):
    session = opened(count=3, images=4)
    best = place_of(session, 2)
    session.choose(best)
    assert session.best == best
    session.choose(best)  # cannot be the worst as well
    session.choose(9)  # no such place
    assert session.progress == (0, 3)
    session.choose(place_of(session, 0))
    session.choose(place_of(session, 1))
    session.tie()  # of the others
    session.tie()  # of all
    for record in records():
        check_record(record)
    assert [record["rank"] for record in records()] == [[3, 2, 1, 2], [2, 1, 2, 2], [1, 1, 1, 1]]


def test_three_images_are_ranked_completely(opened):
    session = opened(count=1, images=3)
    session.choose(place_of(session, 1))
    session.choose(place_of(session, 2))
    assert records()[0]["rank"] == [2, 1, 3]


def test_undo_takes_back_the_last_step_also_of_an_earlier_session(opened):
    session = opened(count=2, images=3)
    session.choose(0)
    session.undo()
    assert session.best is None
    session.tie()
    session.skip()
    session = opened(count=2, images=3)
    assert session.question is None
    session.undo()
    assert session.question == session.questions[1]
    session.undo()
    assert session.question == session.questions[0]
    assert records() == []
    session.undo()  # nothing is left
    session.tie()
    assert len(records()) == 1


def test_undo_leaves_what_others_have_said(opened):
    opened(annotator="bob").tie()
    session = opened(annotator="ada")
    session.tie()
    session.undo()
    session.undo()
    assert [record["annotator"] for record in records()] == ["bob"]


def test_a_session_goes_on_where_it_stopped(opened):
    session = opened(count=5, repeat_fraction=0.4)
    asked = []
    while session.question is not None:
        asked.append(session.question.id)
        session.choose(0)
        session = opened(count=5, repeat_fraction=0.4)
    assert asked == [question.id for question in session.questions]
    assert len(asked) == len(records()) == 7
    assert opened(count=6).question.candidates.prompt == "prompt 5"
    assert opened(count=5, annotator="bob").progress == (0, 5)


def test_a_line_cut_by_a_kill_is_asked_again(opened, capsys):
    session = opened()
    session.tie()
    session.choose(0)
    whole = Path("preferences.jsonl").read_bytes()
    Path("preferences.jsonl").write_bytes(whole[:-30])
    session = opened()
    assert "the last line is cut and was removed" in capsys.readouterr().out
    assert session.question == session.questions[1]
    assert len(records()) == 1
    session.choose(1)
    assert len(records()) == 2


def test_a_whole_line_without_its_end_is_kept(opened):
    opened().tie()
    path = Path("preferences.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    session = opened()
    session.tie()
    assert session.progress == (2, 3)
    assert len(records()) == 2


def test_a_kill_during_undo_changes_nothing(opened, monkeypatch):
    session = opened()
    session.tie()
    session.tie()
    before = Path("preferences.jsonl").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.undo()
    assert Path("preferences.jsonl").read_bytes() == before


def test_broken_files_and_second_sessions_are_refused(opened):
    opened().tie()
    with pytest.raises(ValueError, match=r"annotating in '\.' already"):
        AnnotationSession(prompts(1), ".", "bob")
    path = Path("preferences.jsonl")
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"preferences.jsonl, line 1: 'schema' must be"):
        read_records(path)
    with pytest.raises(ValueError, match="`annotator` is empty"):
        opened(annotator=" ", folder="other")


def test_repeated_questions_tell_consistency_and_are_not_trained_on(opened):
    """Of four prompts asked twice the person sticks to three; the fifth was skipped."""
    session = opened(count=5, repeat_fraction=1.0)
    while (question := session.question) is not None:
        number = question.candidates.metadata["number"]
        if number == 4:
            session.skip()
        elif number == 3:
            session.choose(0)  # whatever lies left
        elif number == 2:
            session.tie()
        else:
            session.choose(place_of(session, number))
    assert session.progress == (10, 10)  # what was skipped is not asked again
    kinds = Counter(record["kind"] for record in records())
    assert kinds == {"pair": 4, "invalid": 5}
    for record in records():
        check_record(record)
    told = json.loads(Path("summary.json").read_text())["ada"]
    assert told == session.summary() == summarise(records())
    assert (told["judged"], told["tied"], told["skipped"], told["repeated"]) == (4, 1, 1, 4)
    assert told["consistency"] == 0.75
    assert told["first_place"] == (1 + 1 + 2) / 6  # swapped places: once each, and always left


def test_a_summary_of_nothing(opened):
    session = opened()
    assert session.summary()["consistency"] is None
    item = {"uid": "a", "path": "a"}
    other = pair_record(id="x", prompt="p", items=[item, {**item, "uid": "b"}], label=[1, 0])
    append_record(session.path, other)  # without an annotator
    session = opened()
    session.tie()
    assert json.loads(Path("summary.json").read_text())[""]["judged"] == 1


def test_a_key_counts_for_the_question_it_was_pressed_at(opened):
    session = opened()
    state = session.state
    session.press("1", state)
    session.press("1", state)  # a double press, before the next images are shown
    assert session.progress == (1, 3)
    session.press("t", session.state)
    session.press("s", session.state)
    assert session.asked == "All questions are answered."
    session.press("3", session.state)
    session.press("u", session.state)
    assert session.asked == "Which image is better?"
    assert [record["kind"] for record in records()] == ["pair", "pair"]


def test_best_and_worst_are_asked_one_after_the_other(opened):
    session = opened(images=3)
    states = {session.state}
    assert session.asked == "Which is the best?"
    session.press("2", session.state)
    assert session.asked == "And which is the worst?"
    assert session.state not in states
    session.press("1", session.state)
    assert session.progress == (1, 3)


def test_the_page_is_for_this_machine_and_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match=r"`host` must be one of .* no login.*ssh -L 8080"):
        annotate("ada", host="0.0.0.0")
    monkeypatch.setattr("lit_align.annotate_page.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lit-align\[annotate\]"'):
        annotate("ada")
