"""How readable is the package? Prints the figures that CONTRIBUTING.md names.

python tests/house.py
"""

import ast, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules(root=ROOT):
    "Source files of the package, without what nbdev generates for itself."
    return [p for p in sorted((root / 'smsbench').rglob('*.py')) if p.name != '_modidx.py']


def functions(trees):
    "Function definitions in some syntax trees."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for t in trees for n in ast.walk(t) if isinstance(n, kinds)]


def body_lines(function):
    return function.body[-1].end_lineno - function.body[0].lineno + 1


def percentile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


def written_lines(text):
    "Lines of a module that a person wrote: without blank ones and nbdev's list of names."
    lines, listed = text.splitlines(), set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__':
            listed |= set(range(node.lineno - 1, node.end_lineno))
    return [line for i, line in enumerate(lines) if line.strip() and i not in listed]


def exported_notebooks(root=ROOT):
    "Notebooks of which a module is made."
    named = [p for p in sorted((root / 'nbs').rglob('*.ipynb')) if 'default_exp' in p.read_text()]
    return [p for p in named if '.ipynb_checkpoints' not in p.parts]


def output_bytes(root=ROOT):
    "Size of the outputs that the notebooks hold."
    cells = [c for p in (root / 'nbs').rglob('*.ipynb') for c in json.loads(p.read_text())['cells']]
    return sum(len(json.dumps(c['outputs'])) for c in cells if c.get('outputs'))


def figures(root=ROOT):
    "name -> number"
    texts = [p.read_text() for p in modules(root)]
    trees = [ast.parse(t) for t in texts]
    lines = [line for t in texts for line in written_lines(t)]
    found = functions(trees)
    bodies = [body_lines(f) for f in found]
    nodes = sum(len(list(ast.walk(n))) for f in found for n in f.body)
    lambdas = sum(isinstance(n, ast.Lambda) for t in trees for n in ast.walk(t))
    widths = [len(line) for line in lines]
    door = (root / 'smsbench' / '__init__.py').read_text()
    return {
        'syntax nodes per body line': round(nodes / sum(bodies), 1),
        'line length, 90th percentile': percentile(widths, 0.9),
        'lines over 100 columns': sum(w > 100 for w in widths),
        'body length, 90th percentile': percentile(bodies, 0.9),
        'longest body': max(bodies),
        'lambdas per 1,000 lines': round(1000 * lambdas / len(lines), 1),
        'public names': len(re.findall(r"^    '\w+':", door, re.M)),
        'notebooks that export': len(exported_notebooks(root)),
        'of these with a letter in the number': sum(
            bool(re.match(r'\d+[a-z]', p.name)) for p in exported_notebooks(root)
        ),
        'outputs in notebooks, kB': round(output_bytes(root) / 1000),
    }


if __name__ == '__main__':
    for name, value in figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT).items():
        print(f'{name:40} {value:>8,}')
