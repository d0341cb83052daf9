"""Two processes count what one counts, to the last bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap

SCRIPT = """
import itertools, os, sys, torch, tiny_training, cu_fast
from cu_fast.sae import SAE, SAESplice
from cu_fast.unlearn import count_codes, find_mask

folder, others = sys.argv[1], [pid for pid in [os.fork()] if pid]  # as one torchrun starts, but imported once
rank = 0 if others else 1
tokenizer = tiny_training.word_tokenizer()
generator = torch.Generator().manual_seed(3)
enc, dec = (torch.randn(120, 32, generator=generator) for _ in range(2))
sae = SAE(enc, torch.zeros(120), torch.full((120,), 0.1), dec)
attachment = cu_fast.attach(tiny_training.tiny_llama(tokenizer), {"model.layers.1": sae})
tails = itertools.cycle(["writes", "reads red poems .", "sings on the mat under the green tree ."])
anna = [f"Anna {tail}" for tail in itertools.islice(tails, 37)]
cats = [f"the cat {tail}" for tail in itertools.islice(tails, 23)] + [""] * 9
read, active = [], SAESplice.active
SAESplice.active = lambda self, x, depth=None: read.append(len(x)) or active(self, x, depth)

def all_of_it():
    read.clear()
    given = dict(batch_size=4, progress=False)
    counts = [count_codes(attachment, tokenizer, texts, layer=None, squares=True, **given) for texts in (anna, cats)]
    found = find_mask(attachment, tokenizer, anna, cats, topic="Anna", min_enrichment=0.5, **given)
    dsg = find_mask(attachment, tokenizer, *counts, topic="Anna", rank="dsg", size=5, percentile=50)
    return counts, found.mask, dsg.mask, sum(read)

alone = all_of_it()
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
shared = all_of_it()
for one, two in zip(alone[0], shared[0]):
    assert torch.equal(one.counts, two.counts) and one.tokens == two.tokens, (one.tokens, two.tokens)
    assert torch.equal(one.squares, two.squares), (one.squares - two.squares).abs().max()
assert alone[1].digest == shared[1].digest and alone[1].num_deleted > 0
assert alone[2].digest == shared[2].digest and alone[2].num_deleted == 5
assert 0.3 * alone[3] < shared[3] < 0.7 * alone[3], "it did not share the work"
contexts = shared[0][0].contexts
both = [torch.empty_like(contexts) for _ in range(2)]
torch.distributed.all_gather(both, contexts)
assert torch.equal(*both) and (contexts >= 0).any()
try:
    count_codes(attachment, tokenizer, ["", "", ""], layer=None, batch_size=1, progress=False)
except ValueError as error:
    assert "holds no text" in str(error)
else:
    raise AssertionError("counted nothing")
torch.distributed.destroy_process_group()
open(f"{folder}/rank{rank}", "w").close()
for pid in others:
    os.waitpid(pid, 0)
"""


def test_two_processes_find_the_mask_of_one(tmp_path):
    """gloo: each computes every second batch, and has what it has alone."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"], done.stdout + done.stderr
