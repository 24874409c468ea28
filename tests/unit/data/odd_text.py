"""Text with every character that tokenizers are known to lose."""

ODD_TEXTS = (
    "",
    " ",
    "   leading and trailing   ",
    "\t\tdef f():\n\t    return  1\n\n\n",
    "windows\r\nmac\rline\x0bfeed\x0c\x85\u2028\u2029end",
    "nul\x00inside\x00\x00",
    "control \x01\x1b[0m\x7f",
    "e\u0301 vs \u00e9, A\u030a\u0323 stacked",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "\u6f22\u5b57\u3000\u304b\u306a \ud55c\uae00 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "ligature \ufb01, full width \uff21\uff11, super \u00b2, dotted \u0130",
    "\u2581 is sentencepiece's space \u2581\u2581a\u2581 b",
    "\u2585 is its unknown, \u2047 what it prints for it",
    "\ufeffbyte order mark, \u00a0 no-break, \u200b zero width, \ufffd replacement",
    "<unk><s></s><pad><|eos|><|pad|><0x41>",
    "\U0010ffff\U000e0001 \ue000 last and private",
    "a" * 300 + " " * 300 + "\n" * 50 + "=" * 100,
    "12345678901234567890 1,000,000.00 0x1F",
)
