"""Short questions that nearly every model can answer, to compare a pruned model's answers.

Only agreement with the dense model counts, not correctness.
"""

from __future__ import annotations

from sleb_serve.data.tokenizer import Tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "How many days are in a leap year?",
    "Name three primary colors.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Why does ice float on water?",
    "Write one sentence about the sea.",
    "What is the opposite of 'ancient'?",
    "List the planets of the solar system in order.",
    "If a train goes 60 miles in one hour, how far does it go in three hours?",
    "What is the chemical symbol of gold?",
    "Give a synonym of 'quick'.",
    "How do you boil an egg?",
    "Which animal is known as the king of the jungle?",
    "What comes after Thursday?",
    "Write a Python function that adds two numbers.",
    "What is the largest ocean on Earth?",
    "Tom has five apples and eats two. How many are left?",
    "What language is spoken in Brazil?",
    "Explain in one sentence what a dictionary is for.",
    "What is the square root of 81?",
    "Is the sun a star or a planet?",
)


def question_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the questions as token ids, formatted with the chat template if there is one."""
    chats = tokenizer.chats
    if chats is None:
        return [list(tokenizer(f"Question: {question}\nAnswer:")) for question in QUESTIONS]
    return [
        list(chats.encode(chats.render([{"role": "user", "content": question}], True)))
        for question in QUESTIONS
    ]
