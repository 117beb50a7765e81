"""Write a student's copy of the project: the functions of the assignments lose their bodies, all else works.

    python course/handout.py OUTPUT                        # assignments 1 to 7
    python course/handout.py OUTPUT --assignments 1-4      # these only (also 3, or 1,3,6-7); the others are given
    python course/handout.py OUTPUT --solutions            # everything stays, to check the grader

A function keeps its signature and its docstring. Its body becomes `raise NotImplementedError("assignment 3: ...")`.
The solutions are the sources themselves, and exist once. So this file names functions and holds no code of theirs.
"""

import argparse
import ast
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Assignment:
    title: str
    functions: dict[str, list[str]]  # file: the qualified names of what a student writes in it


# Each function belongs to one assignment. Earlier experiments must run without the functions of later assignments.
ASSIGNMENTS = {
    1: Assignment("Attention with relative position bias", {
        "beitv2.py": ["relative_position_index", "VisionTransformer.position_bias", "Attention.queries_keys_values",
                      "Attention.forward", "Block.add_attention", "Block.add_mlp"]}),
    2: Assignment("Block-wise masks", {
        "data.py": ["block_mask"],
        "beitv2.py": ["masked_positions"]}),
    3: Assignment("Vector quantization", {
        "tokenizer.py": ["nearest_code", "Quantizer.forward", "Quantizer.count", "Quantizer.update",
                         "Quantizer.init_from", "perplexity"]}),
    4: Assignment("VQ-KD", {
        "support/teachers.py": ["HOG.forward"],
        "tokenizer.py": ["VQKD.encode", "VQKD.decode", "VQKD.token_ids", "VQKD.forward"]}),
    5: Assignment("Masked image modeling", {
        "beitv2.py": ["take", "score", "MaskedImageModel.forward"]}),
    6: Assignment("Patch aggregation", {
        "beitv2.py": ["MaskedImageModel.aggregate"]}),
    7: Assignment("Evaluation and fine-tuning", {
        "beitv2.py": ["Classifier.forward", "lr_scale"],
        "finetune.py": ["knn_accuracy"]}),
}

PROGRAMS = ["*.py", "support/*.py"]
# What a student receives. Not the other tests, which give solutions away, and nothing else of this folder.
COPIED = [*PROGRAMS, "support/*.pt", "README.md", "LICENSE", "Makefile", "requirements.txt", ".gitignore", "configs/*",
          "docs/**/*", "tests/conftest.py", "tests/test_assignment*.py", "course/README.md", "course/experiments.py"]


def find_functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions and methods of a file by qualified name, such as `Block.forward`. Of two alike, the last one."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                found[prefix + child.name] = child
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(source), "")
    return found


def replace_lines(source: str, new: dict[tuple[int, int], str]) -> str:
    """The source with other text for some ranges of lines, (first, last), counted from 1; ranges do not overlap."""
    lines = source.split("\n")
    for (first, last), text in sorted(new.items(), reverse=True):
        lines[first - 1:last] = text.split("\n")
    return "\n".join(lines)


def hollow(source: str, names: list[str], number: int) -> str:
    """The source without the bodies of the functions `names`, which belong to assignment `number`."""
    functions, lines, new = find_functions(source), source.split("\n"), {}
    for name in names:
        function = functions[name]
        has_docstring = ast.get_docstring(function) is not None
        body = function.body[has_docstring:]
        first = body[0].lineno
        while lines[first - 2].strip().startswith("#"):  # comments above the first statement belong to the solution
            first -= 1
        error = f'raise NotImplementedError("assignment {number}: {name}")'
        new[first, function.end_lineno] = " " * body[0].col_offset + error
    return replace_lines(source, new)


def lines_of(function: ast.FunctionDef) -> tuple[int, int]:
    """First and last line, decorators included."""
    return min([function.lineno, *(d.lineno for d in function.decorator_list)]), function.end_lineno


def graft(source: str, names: list[str], donor: str) -> str:
    """The source with the functions `names`, where it has them, as they are in the source `donor`."""
    here, there, lines = find_functions(source), find_functions(donor), donor.split("\n")
    new = {}
    for name in names:
        if name in here:
            first, last = lines_of(there[name])
            new[lines_of(here[name])] = "\n".join(lines[first - 1:last])
    return replace_lines(source, new)


def parse_numbers(text: str) -> list[int]:
    """`1,3,6-7` as [1, 3, 6, 7]. argparse turns the ValueError into a sentence."""
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    if not numbers or not set(numbers) <= set(ASSIGNMENTS):
        raise ValueError
    return sorted(set(numbers))


parse_numbers.__name__ = "assignments (such as 3, 1-4 or 1,3,6-7)"  # argparse's errors name it so


def copy_files(patterns: list[str], output: Path) -> None:
    """Copy the project's files whose paths match one of the patterns into `output`, each to its place."""
    for pattern in patterns:
        for path in sorted(PROJECT.glob(pattern)):
            if path.is_file():
                target = output / path.relative_to(PROJECT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def write_copy(output: Path, numbers: list[int]) -> None:
    """Write the student's copy into `output`, the functions of the assignments `numbers` without their bodies."""
    copy_files(COPIED, output)
    for number in numbers:
        for file, names in ASSIGNMENTS[number].functions.items():
            target = output / file
            target.write_text(hollow(target.read_text(), names, number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--assignments", type=parse_numbers, default=list(ASSIGNMENTS), metavar="1-4",
                        help="which functions to take out (default: all)")
    parser.add_argument("--solutions", action="store_true", help="take nothing out")
    arguments = parser.parse_args()
    if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
        sys.exit(f"error: '{arguments.output}' is there already and is not empty: choose another folder")
    numbers = [] if arguments.solutions else arguments.assignments
    try:
        write_copy(arguments.output, numbers)
    except OSError as error:
        sys.exit(f"error: cannot write '{error.filename}' ({error.strerror}): choose another folder")
    taken = sum(len(names) for n in numbers for names in ASSIGNMENTS[n].functions.values())
    print(f"{arguments.output}: {taken} functions to write, in {len(numbers)} assignments; "
          f"begin with {arguments.output / 'course' / 'README.md'}")


if __name__ == "__main__":
    main()
