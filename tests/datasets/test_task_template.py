"""Task prompts: filled prompts, and what is read from answers."""

import json

import pytest

from llama.datasets.task_template import Template, read_template


def task(**keys):
    return Template({"tasks": {"t": {"user": "x", **keys}}}).tasks["t"]


def test_braces_in_fields_are_text():
    template = {"system": "Rank {{these}}.", "user": "{question}\n{items}\n{n}"}
    fields = {"question": "{n} <|eot_id|> {{}}", "items": ["a {n}", "b"], "n": 3, "unused": 1}
    expected = [
        {"role": "system", "content": "Rank {these}."},
        {"role": "user", "content": "{n} <|eot_id|> {{}}\n1. a {n}\n2. b\n3"},
    ]
    assert task(**template).render(fields) == {"messages": expected}
    with pytest.raises(ValueError, match="the line has no field 'n', which the template of task 't' names"):
        task(**template).render({"question": "a", "items": [], "n": None})
    continued = Template({"tasks": {"t": {"prompt": "Q: {q}"}}}).tasks["t"]
    assert continued.render({"q": "why"}) == {"prompt": "Q: why"}


@pytest.mark.parametrize(
    ("parse", "answer", "parsed"),
    [
        ("integer", "It is 1,234, I think: not 5.", 1234),
        ("integer", "3.14 or -7 of them", -7),
        ("integer", "5-3", 5),
        ("integer", "none, or 2.5", None),
        ("integer", "9" * 5000, None),
        ({"regex": r"so (\w+)"}, "and so it is", "it"),
        ({"regex": r"\d\d"}, "a 123", "12"),
        ({"regex": r"so (x)?"}, "so y", None),
        ({"regex": "z"}, "abc", None),
        ({"integers": 3}, "3,1,2", [3, 1, 2]),
        ({"integers": 3}, "[2] > [1] > [3].", [2, 1, 3]),
        ({"integers": 3}, "2, 2, 1", None),
        ({"integers": 3}, "The 3 best: 2, 2, 1, 4", [3, 2, 1]),
        ({"integers": 2, "least": 1, "most": 20}, "Of 40: 7 > 7 > 12 > 3", [7, 12]),
        ({"integers": 2, "least": 8}, "7, 9", None),
        ({"integers": 3}, "2, 1", None),
        ({"choice": ["A", "B"]}, "(B).", "B"),
        ({"choice": ["A", "B"]}, "Because", None),
        ({"choice": ["A", "B"]}, "B, not A", None),
        ({"choice": ["A", "A+"]}, "An A+ it is", "A+"),
    ],
)
def test_parse_reads_an_answer(parse, answer, parsed):
    found = task(parse=parse).read(answer)
    assert found["parsed"] == parsed
    assert ("parse_error" in found) == (parsed is None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], 'expected {"tasks"'),
        ({"tasks": {}}, "there is no task"),
        ({"tasks": {"a": {"user": "{x"}}}, "task 'a': user: expected '}' before end of string"),
        (
            {"tasks": {"a": {"user": "{x.__class__}"}}},
            "task 'a': user: {x.__class__} is not the name of a field",
        ),
        ({"tasks": {"a": {"user": "{}"}}}, "task 'a': user: {} is not the name"),
        ({"tasks": {"a": {"user": "x", "prompt": "y"}}}, "task 'a': expected either 'user'"),
        ({"tasks": {"a": {"system": "x"}}}, "task 'a': expected either 'user'"),
        ({"tasks": {"a": {"user": "x", "regex": "y"}}}, "task 'a': 'regex' is not a key of a task"),
        ({"tasks": {"a": {"user": "x", "options": {"temprature": 0}}}}, "task 'a': 'temprature' is not a decoding"),
        (
            {"tasks": {"a": {"user": "x", "parse": {"regex": "("}}}},
            "task 'a': parse: '(' is not a regular expression: missing )",
        ),
        (
            {"tasks": {"a": {"user": "x", "parse": {"integers": 0}}}},
            'task \'a\': parse = {"integers": 0}: expected "int',
        ),
    ],
)
def test_a_malformed_template_is_refused_with_the_task_and_the_key(tmp_path, content, message):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        read_template(tmp_path / "t.json")
    assert str(caught.value).startswith(f"{tmp_path / 't.json'}: ") and message in str(caught.value)


def test_a_missing_template_file_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^there is no template file {path}$"):
            read_template(path)


def test_a_line_names_its_task_unless_there_is_only_one():
    two = Template({"tasks": {"a": {"user": "x"}, "b": {"user": "y"}}})
    assert two.task_of({"task": "b"}).name == "b" and task().name == "t"
    for fields in ({}, {"task": "c"}, {"task": ["a"]}):
        with pytest.raises(ValueError, match=r"expected one of 'a', 'b'"):
            two.task_of(fields)
