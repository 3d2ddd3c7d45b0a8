"""The letters used in shape annotations; this is the only place that defines them.

| letter | dimension |
|---|---|
| B | sequences of a batch |
| T | query tokens of one forward pass |
| S | cache slots (capacity) |
| W | cache slots of a block's tail, masked individually |
| N | tree nodes, the root included (in quant/: output features) |
| P | rows of a root-to-leaf path: deepest node's depth + 1 |
| D | hidden size |
| F | feed-forward size |
| H | query heads |
| K | key/value heads (in quant/: input features) |
| C | channels of a head |
| V | vocabulary |
| U | reduced draft vocabulary |
| G | quantization groups along the input features |
| L | layers |
| E | stop token ids |
| J | tokens whose logits a request shifts |
| M | output buffer: tokens one request may receive |
| R | rows of a drafter's pending buffer |
"""
