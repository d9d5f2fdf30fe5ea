"""The paper's figures other than its scores, which are in tasks/*.yaml: tables 3 and 4, and its text on its figures."""

from __future__ import annotations

# Labels of the rows of tables 1, 2 and 5, by the keys that tasks/*.yaml and results use.
ROWS = {
    "full": "Full", "griffin": "GRIFFIN", "layer-wise lora-griffin": "layer-wise LoRA",
    "end-to-end lora-griffin": "E2E LoRA", "layer-wise caprese-griffin": "layer-wise Caprese",
    "end-to-end caprese-griffin": "E2E Caprese", "cats": "CATS", "layer-wise caprese-cats": "layer-wise Caprese (CATS)",
    "end-to-end caprese-cats": "E2E Caprese (CATS)",
}  # fmt: skip
# Their columns; table 5 has those of table 1.
TABLE_1, TABLE_2 = "gsm8k,math,coqa,qasper", "math500,aime24,amc23,brumo25"
LORA, CAPRESE = "layer-wise lora-griffin", ("layer-wise caprese-griffin", "end-to-end caprese-griffin")
# Table 4: Qwen 2.5 14B, bfloat16, an NVIDIA L40; (end to end in s, time to next token in ms).
TABLE_4: dict[str, dict[str, tuple[float, float]]] = {
    "2048+256": {"Full": (10.5, 41), "GRIFFIN": (8.7, 34), "LoRA": (9.5, 37), "Caprese (GRIFFIN)": (8.7, 34)},
    "2048+2048": {"Full": (84.4, 41), "GRIFFIN": (70.3, 34), "LoRA": (76.5, 37), "Caprese (GRIFFIN)": (70.4, 34)},
    "2048+8192": {"Full": (344.9, 42), "GRIFFIN": (287.7, 35), "LoRA": (312.5, 38), "Caprese (GRIFFIN)": (288.8, 35)},
}
# Table 3: AMC 2023, end-to-end Caprese (GRIFFIN), accuracy in percent without reselection, with one every 1024, 256 and
# 64 tokens, and of Full.
TABLE_3 = {
    "DS-Qwen 1.5B": (34.38, 41.87, 45.00, 58.75, 60.83),
    "DS-Qwen 7B": (71.88, 69.25, 73.13, 73.75, 75.00),
    "DS-Qwen 14B": (84.38, 88.13, 88.75, 91.88, 90.63),
}
# What the paper says about a figure or table, by the benchmark that measures it.
SAYS = {
    "residual": """
        The paper's figure has no numbers in print; its finding is that "a relatively small low-rank approximation to
        the top-k residual reduces error more effectively than increasing density".
        """,
    "coverage": """
        In print: E2E Caprese (GRIFFIN) on Llama 3.2 3B Instruct improves Pass@100 by 7.0% with 15.8% less compute
        (140 problems of MATH, ten pools of 100). Figure 6 counts the compute that it spares.
        """,
    "length": """
        In print, MATH-500: responses of Caprese (CATS) are 5.8% shorter than the full DS-Qwen 7B's and 8.5% shorter
        than the 14B's; CATS' are about 1,000 tokens longer.
        """,
    "ablation": """
        The paper's figure has no numbers in print: "for all ablated ranks, Caprese consistently outperforms pure CATS
        by a large margin when CATS performs poorly", and "greater performance is correlated with higher rank" (Llama
        3.2 1B, MATH).
        """,
    "parameters": """
        In print: Caprese "adds roughly 1% new parameters relative to the full model", less for larger ones.
        """,
    "latency": """
        The paper's Caprese takes 34 / 41 = .83 of Full's time for the next token. If a token takes as long as reading
        what it needs, the bytes alone predict this ratio; below, the prediction stands beside each measured ratio.
        """,
}
