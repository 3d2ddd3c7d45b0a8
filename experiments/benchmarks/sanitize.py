"""The code in what a model wrote, after EvalPlus's rules: the longest text that parses, less what is not needed."""

import ast


def sanitize(text: str, entry_point: str) -> str:
    """Imports, and the definitions that `entry_point` needs, of the longest run of lines that is valid Python.

    Text without valid code that defines `entry_point`, such as the bare body of a function, stays as it is.
    """
    lines = _longest_valid(text.split("\n"))
    tree = ast.parse("\n".join(lines))
    nodes = {name: node for node in tree.body for name in _defined(node)}
    if entry_point not in nodes:
        return text
    needed, waiting = set(), [entry_point]
    while waiting:
        name = waiting.pop()
        if name in nodes and name not in needed:
            needed.add(name)
            waiting += _used(nodes[name])
    kept = [
        node
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom) or needed & set(_defined(node))
    ]
    return "\n".join("\n".join(lines[_first(node) - 1 : node.end_lineno]) for node in kept)


def _longest_valid(lines: list[str]) -> list[str]:
    """The run of lines that parses and has the most lines that are not blank; the first one of several."""
    count = len(lines)
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    spans = [(begin, end) for begin in range(count) for end in range(begin + 1, count + 1)]
    spans.sort(key=lambda span: filled[span[0]] - filled[span[1]])
    for begin, end in spans:
        # A run that starts with an indented line cannot parse; most runs are dismissed here.
        if lines[begin][:1].isspace() or not lines[begin]:
            continue
        if _parses("\n".join(lines[begin:end])):
            return lines[begin:end]
    return []


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement binds: functions, classes and plain assignments."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _used(node: ast.stmt) -> list[str]:
    return [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]


def _first(node: ast.stmt) -> int:
    """First line of a statement, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])
