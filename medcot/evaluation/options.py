"""An answer with every mention of an option, by letter or by text, marked as one character of a private area.

What is said about the options can then be read in one way, however they are named (`extraction`).
"""

import re
import unicodedata

FIRST = 0xE000
MARK = "[\ue000-\ue0ff]"
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|\d|[<>≤≥+%]|-(?=\d)")
_PLAIN = (
    (r"\\(?:text|math)?(?:bf|it|rm|tt|sf|normal)?\s*\{([^{}]*)\}", r"\1"),
    (r"\\f?box(?:ed)?\s*\{([^{}]*)\}", r"\nfinal answer: \1\n"),
    (r"(?is)[<\[](?:final[ _-]?)?(?:answer|choice|option|response)[>\]]\s*(.*?)\s*[<\[]/[\w -]+[>\]]", r"\nfinal answer: \1\n"),
    (r"(?i)[\"'](?:\w*[ _])?(?:answer|choice|option|letter|selected)\w*[\"']\s*:\s*([\"'])(.*?)\1", r"\nfinal answer: \2\n"),
    (r"```\w*|</?\w+>|\*|__|`|~~|\\[()\[\]]|\$|(?m:^#+\s)", ""),
    (r"(?<=[^\W_])_(?=[^\W_])", " "),
    (r"[✓✔✅☑]\ufe0f?", " correct "),
    (r"[✗✘❌❎×]\ufe0f?(?!\d)", " incorrect "),
    (r"[“”«»]", '"'),
    (r"[‘’]", "'"),
    (r"[‐‑]", "-"),
)  # fmt: skip
_NAMED = r"(?:(?<!favor )(?<!favour )of|vitamin|hepatitis|type|group|class|grade|stage|influenza|factor|protein|immunoglobulin|ha?emoglobin|phase|strain|" \
         r"complement|amphotericin|penicillin|coenzyme|polymyxin|toxin|category|chain|child|zone|figure|schedule|part|" \
         r"mitomycin|troponin|interferon|apolipoprotein|phospholipase|serogroup|cyclosporin|patient|drug|lead)s?"  # fmt: skip
_AFTER = r"(?:is|are|was|were|isn't|and|or|nor|vs|versus|because|as|since|due|would|wouldn't|could|couldn't|can|can't|cannot|may|might|" \
         r"should|shouldn't|must|will|does|doesn't|do|don't|did|didn't|has|have|seems?|appears?|fits?|match(?:es)?|" \
         r"explains?|describes?|represents?|remains?|refers|offers|provides|gives|it|here|over|rather|instead|not|but|" \
         r"while|whereas|than|with|given|by|based|best|makes?|stands?|only|also|too|out|incorrect|correct|wrong|right|" \
         r"unlikely|therefore|for|if|alone|mentions|suggests|lists|though|although|looks?|sounds?|lacks?|fails?|above|below|on|in|at|from|after|when|then)"  # fmt: skip
_END = rf"(?=\s*(?:$|\n|[,;:!?|)\]\"'}}/]|[-–—=<>]+\s|\.(?:\s*$|\s*\n|\s+[A-Z\d\ue000-\ue0ff]|[)\"']|\s*{MARK})|\(|{MARK})|\s+{_AFTER}\b)"
_WRAPPED = r"(?<![\w)])[(\[](?P<wrapped>[A-Za-z])[.:]?[)\]]"
_LABEL = rf"(?m:^)[\s>|•\-–—\"]*(?:\d+[.)]\s)?(?P<label>[A-Za-z])(?:\)|[.:](?=\s*(?:$|\n|[^\sa-z]))|\s*\||\s[-–—]+>?\s|(?=\s*$|\s*\n)|(?=\s*{MARK}))"
_CUED = (
    r"(?i:\b(?:answer|option|choice|alternative|letter|antwort|respuesta|réponse|reponse|risposta|resposta|correcta|key)s?"
    r"(?:\s+(?:choice|option|letter))?\b[\s:=>\-–—\"'(\[]*(?:(?:is|are|be|would be|must be|should be|ist|es|est)\b)?[\s:\"'(\[]*"
    r"(?:(?:therefore|thus|clearly|definitely|most likely|likely|option|choice|letter|indeed)\b)?[\s:\"'(\[]*)(?P<cued>[A-Za-z])"
    rf"(?!\w|['-]\w)(?![.]\s+[a-z]){_END}"
)
_BARE = rf"(?<![\w.°\-])(?<!\w')(?<!\w\w/)(?P<bare>[A-Z])(?!\w|['-]\w){_END}"
_NAMED_SO = r"(?i:\b(?:option|choice)\s+[(\"\[]*)(?P<named>[A-HJ])(?!\w|['-]\w)(?!\.\s+[a-z])"
_LETTER = re.compile(f"{_CUED}|{_NAMED_SO}|{_WRAPPED}|{_LABEL}|{_BARE}")


def mark_options(text: str, choices) -> str:
    """`text` as plain prose in which every mention of option i is the character 0xE000 + i."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, instead in _PLAIN:
        while (plain := re.sub(pattern, instead, text)) != text:
            text = plain
    text = _mark_texts(text, choices)
    text = _LETTER.sub(lambda match: _letter(match, choices), text)
    text = re.sub(rf"({MARK})\)", r"\1", text)
    # A letter and its own text are one mention; a letter before another option's text is none that can be told.
    text = re.sub(rf"({MARK})(?:[\s).:\]\"'|(,\-–—=]|\bis\b|\bwhich\b)*\1", r"\1", text)
    return re.sub(rf"({MARK})[).:\]]\s*({MARK})(?=[\s.]*(?:$|\n))", r"\1 or \2", text)


def _letter(match, choices) -> str:
    kind, letter = match.lastgroup, match[match.lastgroup]
    index = ord(letter.upper()) - ord("A")
    before = match.string[max(0, match.start() - 30) : match.start()]
    known = index < len(choices) or (kind in ("cued", "wrapped") and letter in "ABCDEFGHJ")
    article = letter == "A" and re.match(rf"\s+(?!{chr(FIRST)}){MARK}", match.string[match.end(kind) :])
    article = article or (letter == "a" and kind in ("cued", "label") and not re.match(r"\s*(?:[).]|$)", match.string[match.end():]))  # fmt: skip
    if not known or article or (letter.islower() and kind == "bare"):
        return match[0]
    if kind != "label" and re.search(rf"(?i)\b{_NAMED}[\s(]*$", before):
        return match[0]
    start = match.start(kind) - match.start()
    lead = match[0][:start].rstrip("([") if kind in ("cued", "named", "wrapped", "label") else ""
    return f"{lead}{chr(FIRST + index)}{match[0][start + 1 :].lstrip(')]') if kind != 'wrapped' else ''}"


def _mark_texts(text: str, choices) -> str:
    found = [(m.start(), m.end(), m[0].casefold()) for m in _TOKEN.finditer(text) if m[0].casefold() != "the"]
    options = [_variants(choice) for choice in choices]
    places = _verbatim(text, found, options) or _near(text, found, options)
    for start, end, option in sorted(places, reverse=True):
        before = re.sub(r"\b(?:[Tt]he|an?)\s+$", "", text[: found[start][0]])
        text = before + chr(FIRST + option) + text[found[end - 1][1] :]
    return text


def _variants(choice: str) -> list[list[str]]:
    """The words of an option, also without a leading article and without what stands in parentheses."""
    choice = unicodedata.normalize("NFKC", choice)
    for pattern, instead in _PLAIN[-3:]:
        choice = re.sub(pattern, instead, choice)
    texts = {choice, re.sub(r"\s*\([^()]*\)", "", choice)}
    words = [[m[0].casefold() for m in _TOKEN.finditer(text)] for text in sorted(texts, key=len, reverse=True)]
    words = [[word for word in each if word != "the"] for each in words]
    words += [each[1:] for each in words if len(each) > 2 and each[0] in ("a", "an")]
    # A lone letter as an option ("A" under a picture) is an article everywhere else.
    return [each for each in words if each and (len(each) > 1 or len(each[0]) > 1 or each[0].isdigit())]


def _verbatim(text, found, options) -> list[tuple[int, int, int]]:
    """(first word, one past the last, option) of every option that stands in the text; of overlapping ones the longest."""
    words, places = [word for *_, word in found], []
    for i, variants in enumerate(options):
        for wanted in variants:
            for place in range(len(words) - len(wanted) + 1):
                if words[place : place + len(wanted)] == wanted and _whole(
                    text, found[place], found[place + len(wanted) - 1]
                ):
                    places.append((place, place + len(wanted), i))
    places.sort(key=lambda match: (match[0] - match[1], match))
    kept = []
    for start, end, option in places:
        if all(end <= a or b <= start for a, b, _ in kept):
            kept.append((start, end, option))
    return kept


def _whole(text, first, last) -> bool:
    """Whether a match is no part of a longer word or number: not "Hodgkin" in "non-Hodgkin", nor "5 mg" in "5 mg/kg"."""
    before, after = text[max(0, first[0] - 5) : first[0]], text[last[1] :]
    if re.search(r"(?i)(?:\bnon-? ?|[^\W_]|\d-|\d\.)$", before) or re.match(r"[^\W_]|/\w|-\w", after):
        return False
    number = first is last and last[2][0].isdigit()
    return not number or re.match(_END, after) is not None


def _near(text, found, options) -> list[tuple[int, int, int]]:
    """As `_verbatim`, for options that stand in the text with a slip of spelling or another ending."""
    from rapidfuzz import fuzz

    words, places = [word for *_, word in found], []
    for i, variants in enumerate(options):
        for wanted in variants:
            option = " ".join(wanted)
            for place in range(len(words) - len(wanted) + 1 if len(option) >= 6 else 0):
                window = words[place : place + len(wanted)]
                # The first letters of every word must agree (hyper- is not hypo-, irreversible not reversible), and numbers.
                same = all(
                    a[:4] == b[:4] and (a == b or not (a + b).isdigit()) for a, b in zip(window, wanted, strict=True)
                )
                if (
                    same
                    and _whole(text, found[place], found[place + len(wanted) - 1])
                    and fuzz.ratio(" ".join(window), option) >= 90
                ):
                    places.append((place, place + len(wanted), i))
    return places if len({place[0] for place in places}) == len(places) else []
