"""Two processes count what one counts, to the last bit."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def test_two_processes_find_the_mask_of_one(tmp_path):
    """torchrun, gloo: each computes every second batch, and has what it has alone."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import itertools, torch, tiny_training, cu_fast
            from cu_fast.unlearn import count_codes, find_mask, reading

            tokenizer = tiny_training.word_tokenizer()
            generator = torch.Generator().manual_seed(3)
            enc, dec = (torch.randn(120, 32, generator=generator) for _ in range(2))
            sae = cu_fast.SAE(enc, torch.zeros(120), torch.full((120,), 0.1), dec)
            attachment = cu_fast.attach(tiny_training.tiny_llama(tokenizer), {{"model.layers.1": sae}})
            tails = itertools.cycle(["writes", "reads red poems .", "sings on the mat under the green tree ."])
            anna = [f"Anna {{tail}}" for tail in itertools.islice(tails, 37)]
            cats = [f"the cat {{tail}}" for tail in itertools.islice(tails, 23)] + [""] * 9
            read, active = [], cu_fast.sae.SAESplice.active
            cu_fast.sae.SAESplice.active = lambda self, x, depth=None: read.append(len(x)) or active(self, x, depth)

            def all_of_it():
                read.clear()
                options = dict(layer=None, squares=True, batch_size=4, progress=False)
                counts = [count_codes(attachment, tokenizer, texts, **options) for texts in (anna, cats)]
                finding = find_mask(
                    attachment, tokenizer, anna, cats, topic="Anna", min_enrichment=0.5, batch_size=4, progress=False
                )
                dsg = find_mask(attachment, tokenizer, *counts, topic="Anna", rank="dsg", size=5, percentile=50)
                return counts, finding, dsg, sum(read)

            alone = all_of_it()
            torch.distributed.init_process_group("gloo")
            rank = torch.distributed.get_rank()
            shared = all_of_it()
            same = all(
                torch.equal(one.counts, two.counts) and one.tokens == two.tokens and torch.equal(one.squares, two.squares)
                for one, two in zip(alone[0], shared[0])
            )
            same &= alone[1].mask.digest == shared[1].mask.digest and alone[1].mask.num_deleted > 0
            same &= alone[2].mask.digest == shared[2].mask.digest and alone[2].mask.num_deleted == 5
            same &= 0.3 * alone[3] < shared[3] < 0.7 * alone[3]  # it did share the work
            contexts = shared[0][0].contexts
            mine = [torch.empty_like(contexts) for _ in range(2)]
            torch.distributed.all_gather(mine, contexts)
            same &= torch.equal(*mine) and bool((contexts >= 0).any())
            try:
                count_codes(attachment, tokenizer, ["", "", ""], layer=None, batch_size=1, progress=False)
            except ValueError as error:
                same &= "holds no text" in str(error)
            else:
                same = False
            with open({str(tmp_path / "rank")!r} + str(rank), "w") as file:
                file.write(str(same))
            torch.distributed.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [path.read_text() for path in sorted(tmp_path.glob("rank*"))]
    assert said == ["True", "True"], done.stdout + done.stderr
