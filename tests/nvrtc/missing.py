"""Which of the suite's kernels were not collected: python missing.py COLLECTED RECORDED, of collect.py and record.py.

Prints the test that first had each such kernel, and its declaration. Some are always left: sums along other axes than
those of the samples, functions of a test's own, and what differs in a·b for b·a only: a process writes a product as it
first came by it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compile import parts_of, same

collected, recorded = ({json.dumps(same(u)): u for u in json.loads(Path(p).read_text())} for p in sys.argv[1:])
for key, unit in recorded.items():
    if key not in collected:
        declaration, _, _ = parts_of(unit)[2].partition("{")
        print(unit["of"][0], " ".join(declaration.split()), sep="\n    ")
print(f"{len(recorded)} kernels recorded, of which {len(recorded.keys() - collected.keys())} were not collected")
