"""SGLang's own Triton attention, on Triton's interpreter, with the mask of draft trees: prints the largest errors of two requests beside torch,
and what the second would be without a mask. A process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import torch
from sglang_host import interpreted
from torch.nn.functional import scaled_dot_product_attention

REQUESTS, DEPTH, BEST, DRAFTS = 2, 5, 4, 20
HEADS, KV_HEADS, DIM, POOL = 4, 2, 64, 400


def main() -> None:
    """Runs the kernel over slots in no order."""
    interpreted.prepare()
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    from dflash_rs.sglang.trees import Tree

    generator = torch.Generator().manual_seed(0)
    log_probs, found = torch.randn(REQUESTS, DEPTH, 100, generator=generator).log_softmax(-1).topk(BEST)
    tree = Tree.build(torch.tensor([1, 2]), found, log_probs, DRAFTS)
    nodes, starts = tree.nodes, torch.tensor([37, 130])
    keys, values = torch.randn(2, POOL, KV_HEADS, DIM, generator=generator)
    queries = torch.randn(REQUESTS, nodes, HEADS, DIM, generator=generator)
    order = torch.randperm(POOL, generator=generator)
    slots = [order[: 37 + nodes], order[100 : 230 + nodes]]
    out = torch.empty(REQUESTS * nodes, HEADS, DIM)
    ends = torch.zeros(REQUESTS + 1, dtype=torch.int32)
    ends[1:] = torch.cumsum(starts, 0)
    masks = torch.zeros(REQUESTS + 1, dtype=torch.int32)
    masks[1:] = torch.cumsum(nodes * (starts + nodes), 0)
    extend_attention_fwd(
        queries.flatten(0, 1),
        torch.cat([keys[own[-nodes:]] for own in slots]),
        torch.cat([values[own[-nodes:]] for own in slots]),
        out,
        keys,
        values,
        torch.arange(REQUESTS + 1, dtype=torch.int32) * nodes,
        ends,
        torch.cat([own[:-nodes] for own in slots]),
        tree.mask(starts, int(masks[-1]) + 77),
        True,
        masks,
        nodes,
        1.0,
        1.0,
    )

    def beside_torch(number: int, seen: torch.Tensor) -> float:
        start, own = int(starts[number]), slots[number]
        expected = scaled_dot_product_attention(
            queries[number].transpose(0, 1)[None],
            keys[own].transpose(0, 1)[None],
            values[own].transpose(0, 1)[None],
            attn_mask=torch.cat([torch.ones(nodes, start, dtype=torch.bool), seen], 1),
            enable_gqa=True,
        )[0].transpose(0, 1)
        return float((out.view(REQUESTS, nodes, HEADS, DIM)[number] - expected).abs().max())

    for number in range(REQUESTS):
        print(beside_torch(number, tree.seen[number]))
    print(beside_torch(1, torch.ones(nodes, nodes, dtype=torch.bool).tril()))


if __name__ == "__main__":
    main()
