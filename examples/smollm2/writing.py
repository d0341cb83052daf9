"""What the model itself writes: texts about subjects, names near a topic, questions and their answers.

    python writing.py MODEL FOLDER

writes gen_<topic>.json for the topics of FOLDER/subjects.json. The study asks for the rest: all that a user gives of a topic
is its name and the subjects that its texts are about.

What is near a topic is asked for by examples, in lines that the model continues, as a model this small does not follow
"name what is like X, but is not X": subjects like the topic, the field that it belongs to, subjects of that field, and
fields like it. Names that the topic's own prompts hold are the topic, and are left out.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from topics import chat
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATES = (
    "Tell me about {}.",
    "Write a short article about {}.",
    "What do you know about {}?",
    "Explain {} to a student.",
    "Give me five facts about {}.",
    "Write an encyclopedia entry on {}.",
    "Write a quiz question and its answer about {}.",
    "Why is {} important?",
)
ALIKE = """Each line gives a subject, and then ten other subjects that are like it.

Tennis: badminton, golf, squash, volleyball, cricket, baseball, boxing, swimming, rowing, skiing
Beethoven: Mozart, Bach, Chopin, Haydn, Schubert, Brahms, Liszt, Handel, Verdi, Vivaldi
Brazil: Argentina, Chile, Peru, Mexico, Colombia, Bolivia, Cuba, Ecuador, Venezuela, Paraguay
Cats: dogs, rabbits, lions, mice, foxes, horses, wolves, birds, goats, hamsters
Moby-Dick: Robinson Crusoe, Treasure Island, Don Quixote, Dracula, Frankenstein, Gulliver's Travels, The Odyssey, Oliver Twist, The Jungle Book, Peter Pan
"""
FIELD = """Each line gives a subject, and the field that it belongs to.

Tennis: sports
Beethoven: music
Brazil: geography
Cats: animals
Moby-Dick: literature
"""
PARTS = """Each line gives a field, and then ten subjects of it.

Sports: tennis, golf, swimming, football, boxing, rowing, cricket, skiing, running, baseball
Music: Beethoven, the piano, jazz, opera, the violin, Mozart, singing, the drums, folk songs, the orchestra
Animals: cats, horses, whales, birds, snakes, elephants, wolves, frogs, bees, monkeys
"""
ASK = """Questions and answers about tennis.
Q: How many players are on each side in a singles match?
A: The number of players on each side in a singles match is one.
Q: What do tennis players hit the ball with?
A: Tennis players hit the ball with a racket.

Questions and answers about Beethoven.
Q: In which city was Beethoven born?
A: Beethoven was born in the city of Bonn.
Q: Which instrument did he play?
A: The instrument that Beethoven played was the piano.

Questions and answers about {}.
Q:"""
TEMPERATURE, TOP_K = 0.8, 50
FEW_WORDS = set("the a an of and in to about is it its from by with on are how what as his s d de for at".split())


@torch.inference_mode()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    seed: int,
    copies: int = 1,
    batch_size: int = 64,
) -> list[str]:
    """What the model writes on: ``copies`` of each prompt's, one after another."""
    torch.manual_seed(seed)
    written = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
        ids = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, num_return_sequences=copies
        )  # fmt: skip
        written += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return written


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def question_of(prompt: str) -> str:
    """What was asked in the model's chat format."""
    return prompt.split("\n")[1].removesuffix("<|im_end|>")


def subject_of(prompt: str) -> str:
    """Of a prompt that a template made."""
    question = question_of(prompt)
    for template in TEMPLATES:
        if found := re.fullmatch(re.escape(template).replace(r"\{\}", "(.*)"), question):
            return found[1]
    raise ValueError(f"{question!r} is of no template; write the texts with writing.py")


def names_near(model: Any, tokenizer: Any, topic: str, prompts: Iterable[str], number: int) -> list[str]:
    """Names near a topic, those first that the model says most.

    Args:
        model: writes.
        tokenizer: the model's.
        topic: its name in English.
        prompts: of the topic's texts; a name of their words alone is the topic's own.
        number: of names, at most.
    """
    own = set().union(*(words(question_of(prompt)) for prompt in prompts))

    def more(head: str, subjects: Iterable[str], seed: int, copies: int) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        lines = [f"{head}{one[0].upper()}{one[1:]}:" for one in subjects]
        for line in sample(model, tokenizer, lines, 48, seed, copies):
            some = [
                re.sub(r"^the ", "", name.strip(" .\t"), flags=re.I) for name in line.split("\n")[0].split(",")[:10]
            ]
            for name in dict.fromkeys(some):
                said = words(name) - FEW_WORDS
                if said and len(name) < 40 and not said <= own and not words(topic) - FEW_WORDS <= said:
                    found[name] += 1
        return found

    said = sample(model, tokenizer, [f"{FIELD}{topic[0].upper()}{topic[1:]}:"], 6, seed=1, copies=16)
    fields = collections.Counter(line.split("\n")[0].strip(" .").lower() for line in said)
    two = [field for field, _ in fields.most_common(2) if field]
    spelled: dict[str, str] = {}
    total: collections.Counter[str] = collections.Counter()
    for found in (more(ALIKE, [topic], 0, 16), more(PARTS, two, 2, 12), more(ALIKE, two, 3, 6)):
        for name, times in found.most_common():
            spelled.setdefault(name.lower(), name)
            total[name.lower()] += times
    return [spelled[name] for name, _ in total.most_common(number)]


def questions(
    model: Any, tokenizer: Any, subjects: Sequence[str], seed: int, copies: int = 1
) -> list[tuple[str, str, str]]:
    """(subject, question as a prompt, the same with its answer), about three per subject and copy."""
    found: dict[tuple[str, str, str], None] = {}
    written = sample(model, tokenizer, [ASK.format(one) for one in subjects], 100, seed, copies)
    for number, text in enumerate(written):
        pairs = re.findall(r"(?:^|Q:) *([^\n]+\?)[^\n]*\nA: *([^\n]+)", text.split("\nQuestions and")[0])
        for ask, answer in pairs:
            found[subjects[number // copies], chat(ask.strip()), chat(ask.strip()) + answer.strip()] = None
    return list(found)


def texts_near(
    model: Any, tokenizer: Any, topic: str, prompts: Sequence[str], number: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Names near a topic, and (prompt, text that begins with it) on them: questions with answers, and what is told.

    Left out is what holds a word of the topic's subjects that is not of the name it was asked about: asked for the moons
    of other stars, the model tells of our own.
    """
    near = names_near(model, tokenizer, topic, prompts, number)
    told = texts(model, tokenizer, [f"Tell me about {one}." for one in near], 64, seed=12)
    found = questions(model, tokenizer, near, seed=11) + [(one, *pair) for one, pair in zip(near, told)]
    own = set().union(*(words(subject_of(prompt)) for prompt in prompts)) - FEW_WORDS
    return near, [(prompt, text) for name, prompt, text in found if not (words(text) - words(name)) & own]


def texts(model: Any, tokenizer: Any, asked: Sequence[str], new_tokens: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, text that begins with it)."""
    prompts = [chat(one) for one in asked]
    return [(a, a + b) for a, b in zip(prompts, sample(model, tokenizer, prompts, new_tokens, seed))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    for topic, given in json.loads((options.folder / "subjects.json").read_text()).items():
        asked = [TEMPLATES[i].format(one) for n, one in enumerate(given["subjects"]) for i in range(n % 2, 8, 2)]
        written = [{"prompt": a, "text": b} for a, b in texts(model, tokenizer, asked, 100, seed=0)]
        (options.folder / f"gen_{topic}.json").write_text(json.dumps(written, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
