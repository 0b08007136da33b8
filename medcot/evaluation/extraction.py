"""Which option an answer chooses, if any.

Kept libraries look for a letter after a cue and take the first or the last (lm-evaluation-harness's `multi_choice_regex`
filter, the "Answer: X" pattern of simple-evals); they do not know "X, not Y", "Option D is incorrect" or a list of all
options, so what is said about each option is read here.
"""

import re

from .options import FIRST, MARK, mark_options

# Patterns are written with @ for the option they speak of and ~ for anything but an option or the end of a clause.
_ANSWER = (
    r"\b(?:answer|option|choice|response|alternative|key|pick|selection|verdict|solution|conclusion|result|guess|decision|"
    r"(?:correct|right|best) one|correct|right|final|antwort|respuesta|réponse|risposta|resposta|correcta|correcte|ответ)s?"
    r"(?: (?:answer|choice|option|letter|here|key|correcta|is|says))*"
)
_IS = r"\s*(?:[:=>→⇒]|[-–—]+>?|\b(?:is|was|would be|will be|should be|must be|has to be|to be|remains|becomes|says|ist|es|est|è|é)\b)"
_SKIP = (
    r"(?:[\s:\"'(\[>,-]|\b(?:therefore|thus|hence|then|clearly|definitely|most|likely|probably|indeed|option|choice|letter|answer|the|"
    r"an?|to|be|give|that|of|by|far|patient|with)\b)*"
)
_RIGHT = (
    r"(?:correct|right|best|better|answer|true|preferred|most (?!common|frequent|prevalent)\w+|appropriate|accurate|superior|the key|choice|pick|what (?:I|we|(?:this|the) patient)|"
    r"more (?:likely|appropriate|plausible|probable|suitable)(?! to\b| in\b| with\b| when\b)|one (?:to|that)|(?:\w+ ){1,3}of choice)\b"
)
_CHOOSE = (
    r"(?:choose|chose|pick|select|go(?:ing)? (?:with|for)|went with|opt for|answer|say|settle on|conclude(?: that it is)?|favou?r|vote for|lean(?:ing)? (?:towards?|to)|"
    r"arrive at|give|recommend|prescribe|start|order|choosing|picking|mark|keep)"
)
_FINAL = (rf"\bfinal (?:answer|choice|decision)(?:{_IS})?{_SKIP}@",)
_STATED = (
    rf"{_ANSWER}{_IS}{_SKIP}@",
    r"^\W*(?:the )?(?:correct |right |best )?answer\W{1,4}@",
    r"\b(?:correct|right|best|final|my) (?:answer|option|choice)\W{1,4}@\W*$",
    r"\b(?:correct|right|best) \w+:\s*@",
    r"^\W*@(?:\s*[,–—-]\s*(?:since|because|as|given)|\s+because)\b",
    rf"\b(?:correct|right|best|most (?!common|frequent|prevalent)\w+|answer|appropriate|suitable)\b~{{0,60}}\b(?:is|would be|must be|should be)(?: to {_CHOOSE}\b)?{_SKIP}@",
    rf"@[\s\"')]*(?:(?:(?:this |that |it )?(?:is|would be)|are|was|must be|remains|seems|as)\b|[|:=–—-])[\s:|–—-]*"
    rf"(?:(?:clearly|definitely|therefore|thus|also|indeed|likely|by far|the|an?|our|my|your|final|only|single|one)\b\s*)*{_RIGHT}",
    r"@[\s\"').:|=–—-]*\b(?:yes|correct|true|right)\b(?! if)",
    rf"\b(?:I|we|you)(?:'d|'ll|'m| would| will| should| am| must| have to|)"
    rf"(?: (?:therefore|thus|definitely|still|rather|probably|going to))* {_CHOOSE}\b{_SKIP}@",
    rf"(?:^|[:;,.]\s*|\bso |\btherefore |\bplease )(?:choose|select|pick|keep|mark|tick|go (?:with|for))\b{_SKIP}@",
    rf"\b(?:select(?:ed|ion)?|chosen)(?: (?:answer|option|choice|is))*{_IS}{_SKIP}@",
    r"@[\s:–—-]*\b(?:it is|stands out|fits? (?:best|it best|well|every\w*|all)|makes? (?:the )?(?:most |more |best )?sense)\b",
    rf"\b(?:leaves?|leaving|left with|arrive at|boils down to)(?: (?:us|me|only|with))*{_SKIP}@",
)
_ARGUED = (
    r"\b(?:most likely|likely|probably|best|diagnosis|suggest\w*|consistent with|in keeping with|indicat\w+|point(?:s|ing)? to(?:wards?)?|support\w*|"
    r"therefore|thus|hence|so|recommend\w*|should|appropriate|next step|treatment|called|known as|named|termed|confirm\w*|only|"
    r"explained by|caused by|due to|suffering from|attributed to|classic (?:\w+ )?(?:for|of)|needs?|requires?|use|give|start|perform|order|remains?|leaves)\b~*@",
    r"\b(?:be|is|are|has|have|case of)\s+(?:(?:an?|the|chronic|acute)\s+)*@\W*$",
    r"\bacts? (?:on|in|at)\b~*@",
    r"\bthis occurs in (?:the )?@",
    r"^\W*(?:but|yet)\W+(?:rather )?(?:\w+ ){0,2}@",
    r"(?:→|⇒|=>)\W*@\W*$",
    r"^\W*@ (?:should|must|needs to|has to) be (?:given|started|performed|administered|done|ordered|offered|prescribed|used)\b",
    r"\b(?:vignette|case|scenario|stem|picture) (?:describes|illustrates|represents|depicts)\W*@",
    r"\b(?:this|these|his|her|the patient)\b~*\b(?:characteristic|typical|pathognomonic|diagnostic) (?:of|for)\b~*@",
    r"^\W*@ is the most \w+ \w+\W*$",
    r"\bmost (?:common|frequent|prevalent)\b~*@\W*$",
    rf"\b(?:it is|it's|this is|these are|that is|it must be|this must be|which is|i'd say|i think|say|go for)\b{_SKIP}@",
    r"^\W*(?:\w+ ){0,3}@~*\b(?:fits?|explains?|accounts? for|likely|best|remains?(?! an?\b)|appropriate|recommended|indicated|preferred|because|"
    r"since|therefore)\b",
)
_NO = (
    r"(?i)\b(?:not|never|neither|nor|no|without|incorrect|wrong|false|unlikely|(?:less|least) (?:likely|appropriate|suitable|probable)|"
    r"inappropriate|contraindicated|unnecessary|insufficient|inadequate|excluded?s?|excluding|rul(?:e[sd]?|ing) out|ruled|eliminat\w+|"
    r"reject\w*|dismiss\w*|discard\w*|except|unlike|cannot|rather than|instead of|as opposed to|versus|vs|fails?|lacks?|against|"
    r"implausible|irrelevant|unrelated|inconsistent|invalid|inferior|unwise|unsafe|harmful|dangerous|avoid\w*|stop|stopp\w+|discontinu\w+|withh\w+|cross(?:ed)? out|set aside|steer|clear of|allerg\w+|poor|bad|mistake|ignor\w+|overlook\w*|nothing|other than|than|doubt\w*|worse|"
    r"would (?:need|require|present|cause|show|have|expect|worsen|delay|harm)|is out|are out|expected (?:only )?in|falsch|incorrecta)\b"
    r"|n't\b|^\W*over\b"
)
_PERHAPS = (
    r"(?i)\b(?:may|might|could|possibl[ey]|possibilit\w*|seen in|perhaps|maybe|plausible|consider\w*|whether|if|unless|differential|"
    r"includ\w+|such as|like|e\.g\.|for example|initially|at first|first(?!-)|originally|thought|lean\w*|tempt\w*|mistake\w*|students?|"
    r"distractor|history of|either|between|among(?! (?:the (?:options|choices|answers)|these|those))|think about|both|"
    r"(?:options|choices) (?:are|were)|otherwise|unsure|uncertain|unable|before|previously|already|taken|was given|determine|difficult|hard to|unclear|more information|depends|"
    r"would have been|alternatives?|although|though|while|despite|even|(?:as|is) an option|(?:and so|as) (?:is|are|do|does)|so (?:is|are)(?= [\ue000-\ue0ff])|many|some|"
    r"most (?:people|candidates)|sometimes|often|usually|commonly|comes? to mind|(?:to|for|before) (?:confirm|diagnos)\w*|was going to|"
    r"(?:confirm|diagnos|evaluat|assess)ing|evaluate|assess|analy[sz]e|examine|discuss)\b"
)
_SUPPOSED = (
    r"(?i)\b(?:unless|whether|students?|many|some|people|either|both|thought|wondered|(?:hard|difficult|impossible) to|unable|sure if|otherwise|someone|everyone|"
    r"was (?:going|about|tempted|inclined) to|initially|at first|normally|ordinarily|usually|if (?!(?:I|we|you) ))\b"
)
_PROVIDED = r"(?i)\bjust as \w+\b|\bequally (?:likely|plausible|good|possible|valid|probable)\b|^\W*(?:if|unless|(?:were|had) (?:it|he|she|they|this|the|there))\b(?! (?:I|we|you|one|forced|pressed|asked|only)\b)"
_CAN_NOT_SAY = (
    r"(?i)\b(?:cannot|can't|can not|unable to|do not|don't|not possible to|impossible to|not enough|insufficient|(?:difficult|hard) to|"
    r"more)\b[^.\n]{0,30}\b(?:determine|say|tell|answer|know|choose|decide|select|information|data|details|help)\b"
    r"|\b(?:not|un)(?: ?sure|certain)\b|\b(?:(?:tell|give) (?:me|us)|let (?:me|us) (?:know|start))\b|\bplease (?:provide|send|share)\b|\bneed to know\b|\?\W*$"
)
# "the diagnosis of B requires experience": the sentence is about something else, of which the option is a part.
_TOPIC = (
    rf"(?i)\b(?:of|for|about|on|when|under)\s+{MARK}\s+(?:\w+ly\s+)?(?:(?!as\b|this\b|plus\b|versus\b|vs\b|because\b)\w+s|had|"
    r"can|will|would|could|may|might|were|differ|depend|require|have)\b(?! (?:therefore |thus |clearly )?(?:indicated|recommended|"
    r"appropriate|required|needed|best|preferred|likely|correct|right))"
    rf"|\b(?:about|regarding|concerning|background on)\W{MARK}"
)
_RETRACTED = (
    rf"(?i)(?:\b(?:that|this|it)|{MARK})(?:'s| is| was) (?:\w+ )?(?:wrong|incorrect|mistaken|not (?:right|correct)|a mistake)\b|"
    r"\btake (?:that|it) back\b|\b(?:don't|do not|can't|cannot|can not|unable to|impossible to) (?:\w+ )?"
    r"(?:know|say|tell|determine|decide|choose|answer)\b|\b(?:not sure|unsure)\b"
)
# What would otherwise be read as its opposite, or apart from the option it is said of ("B. This is wrong.", "Is it B? Yes.").
_SAME = (
    (r"(?i)\b(?:anything but|far from|hardly|scarcely|by no means)\b", "not"),
    (r"(?i)\b(?:there(?: is|'s) )?(?:no|without (?:an?y? )?)(?: \w+)? ?doubt\b(?: that)?", ""),
    (r"(?i)\b(?:no|nothing) (?:other|else)(?: \w+){0,2} (?:than|but|except)\b", "only"),
    (rf"(?i)({MARK})[^.?!\n]*\?\s*(?=yes\b)", r"\1: "),
    (
        rf"(?i)({MARK})[\s.:–—-]+(?=(?:this|that|it)(?: is|'s| was| would be| seems)(?: not| also| clearly| therefore| the| an?| most| less| least)* "
        r"(?:incorrect|correct|right|wrong|false|true|(?:un)?likely|(?:in)?appropriate|answer|best)\b"
        r"|(?:incorrect|correct|right|wrong|false|true)\s*(?:[.,;]|$))",
        r"\1 ",
    ),
    (r"(?i)(:|=|\bis|\bbe)[ \t]*\n\s*", r"\1 "),
)
# A sentence on a group of people is none on this patient.
_GROUP = (
    r"(?i)\b(?:in|for|of|among|during) (?:the |most |all |only )?(?:\w+ )?(?:adults?|children|childhood|infants?|infancy|neonates?|newborns?|"
    r"elderly|pregnan\w+|women|men|males?|females?|smokers|severe|mild|general|trials?|other (?:\w+ )?(?:settings?|cases|patients))\b"
)
_HERE = r"(?i)\b(?:this|these|here|our|his|her|she|he|answer|correct|therefore|thus|so|hence|the patient|the (?:child|infant|woman|man|boy|girl))\b"
_UNSAID = r"(?i)\?\s*$|\b(?:and|or|but|vs|versus|either)\s*$"  # asked, or cut off
_TURN = r"(?i)\b(?:wait|actually|on second thoughts?|correction|let me (?:reconsider|correct)|scratch that|change my|on reflection|no, )"
_SENTENCE = re.compile(r"(?<!\bvs\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\b[A-Z]\.)(?<=[.!?;])\s+")
_CLAUSE = re.compile(
    r"(?i),? (?=\b(?:but|yet|while|whereas|although|though|unlike|rather than|instead of|as opposed to|because|since|over|than|"
    r"and not|not as|nor)\b)|, (?:and )?(?=not\b)|, |\s[-–—]\s|: (?=not\b)| \((?=not\b)"
)
_JOINED = rf"(?:[\s,/)]*(?:and/or|and|or|&)?[\s,/(]*(?:(?:maybe|perhaps|possibly|even|options?) )*{MARK})*"
_LISTED = re.compile(
    rf"{MARK}(?=(?:[\s,/()<>&+]|\b(?:and|or|the|an?|option|choice|then|plus|as well as|even|also|with|to|[A-Z]\d?)\b)*[,/<>&+]?"
    rf"(?:[\s,/()<>&+]|\b(?:and|or|the|an?|option|choice|plus|even|also|with|to|[A-Z]\d?)\b)*{MARK})"
)


def _compiled(patterns) -> tuple[re.Pattern, ...]:
    inside = MARK[1:-1]
    return tuple(
        re.compile(each.replace("@", f"(?P<o>{MARK})").replace("~", f"[^.;:?{inside}]"), re.IGNORECASE)
        for each in patterns
    )


_FINAL, _STATED, _ARGUED = map(_compiled, (_FINAL, _STATED, _ARGUED))


def extract_choice(text: str, choices) -> int | None:
    """Index of the option that `text` chooses, None where it chooses none that can be told.

    A statement of the answer ("the answer is B", a boxed or tagged letter, "B is correct", a line that is only "B")
    outranks an option that is argued for, and that one a mere mention. Options that are negated, rejected ("X, not Y"),
    considered or listed never count. Where two remain that are stated alike, none is chosen: an option assigned wrongly
    costs a comparison more than one not found.
    """
    marked = _without_lists(mark_options(text, choices))
    turns = [match for match in re.finditer(_TURN, marked) if not marked[: match.start()].rstrip().endswith("?")]
    for start in [*(match.end() for match in reversed(turns)), 0]:
        said = _said(marked[start:])
        for rank in ("final", "stated", "argued") if start else ("final", "stated"):
            if said[rank]:
                return _only(said[rank], choices)
        if start and re.search(_RETRACTED, marked[start:]):
            return None
    return None if re.search(_CAN_NOT_SAY, marked) else _only(said["argued"] or said["mentioned"], choices)


def _only(options: set[int], choices) -> int | None:
    return min(options) if len(options) == 1 and max(options) < len(choices) else None


def _without_lists(marked: str) -> str:
    """The text without lists of bare options (the question's own, a differential), and headings joined to what follows."""
    line = rf"[ \t>|•\-–—\d.)]*{MARK}[ \t.,;:|)]*(?:\n|$)"
    marked = re.sub(
        rf"(?m:(?:^{line}\s*){{2,}})", lambda found: "\n" if len(_options(found[0])) > 1 else found[0], marked
    )
    marked = re.sub(  # "all but B are wrong"
        rf"(?i)\b(?:all|everything|every \w+)(?: \w+){{0,3}} (?:but|except|besides) ({MARK})(?=[^.]*"
        rf"\b(?:wrong|incorrect|excluded|ruled out|eliminated|false)\b)[^.\n]*",
        r"the answer is \1",
        marked,
    )
    for pattern, instead in _SAME:
        marked = re.sub(pattern, instead, marked)
    return marked


def _said(marked: str) -> dict[str, set[int]]:
    """Options by how they are spoken of: final, stated, argued, mentioned."""
    said = {rank: set() for rank in ("final", "stated", "argued", "mentioned")}
    passed, alone = set(), set()
    for line in marked.split("\n"):
        sentences = [sentence for sentence in _SENTENCE.split(line) if sentence.strip()]
        for place, sentence in enumerate(sentences):
            if not _options(sentence) or re.search(_UNSAID, sentence):
                continue
            if re.search(_GROUP, sentence) and not re.search(_HERE, sentence):
                passed |= _options(sentence)
                continue
            stated = {"final": _stated(sentence, _FINAL), "stated": _stated(sentence, _STATED)}
            if re.fullmatch(rf"\W*{MARK}[^\w:]*", sentence) and place in (0, len(sentences) - 1):
                alone |= _options(sentence)
                continue
            for rank, options in stated.items():
                said[rank] |= options
            if not any(stated.values()):
                passed |= _weigh(sentence, said)
            else:
                passed |= _options(sentence) - set().union(*stated.values())
    if len(alone) == 1 or not said["stated"]:  # several are the headings of what is said of each
        said["stated"] |= alone
    short = len(marked.split()) <= 40
    first = _options(_SENTENCE.split(marked.strip().split("\n")[0])[0])
    said["mentioned"] -= passed
    if not short and said["mentioned"] - first:
        said["mentioned"] = set()
    return said


def _weigh(sentence: str, said) -> set[int]:
    """Adds the option that a sentence without a statement argues for or mentions; gives back those that it passes over."""
    passed, favoured = _enumerated(sentence), {}
    for clause in _CLAUSE.split(sentence):
        options = _options(clause) - passed
        if len(options) != 1 or any(re.search(each, clause) for each in (_NO, _PERHAPS, _TOPIC)):
            passed |= options
            continue
        argued = any(pattern.search(clause) for pattern in _ARGUED)
        turned = re.match(r"(?i)\W*(?:but|yet|however|so|therefore)\b", clause)
        if not re.search(_PROVIDED, sentence) and (argued or turned or not re.search(_PERHAPS, sentence)):
            favoured |= dict.fromkeys(options, "argued" if argued else "mentioned")
            if not argued and not _is_named(clause):
                favoured |= dict.fromkeys(options, "passing")
        else:
            passed |= options
    if len(favoured) == 1:
        ((option, rank),) = favoured.items()
        if rank == "passing":
            return passed
        said[rank].add(option)
        return passed - {option}
    return passed | set(favoured)


def _is_named(clause: str) -> bool:
    """Whether a clause says little but an option: "IV ceftriaxone 2 g", and not "aspirin can wait"."""
    others = re.sub(MARK, " ", clause).split()
    return len(others) <= 3 and not re.search(
        r"(?i)\b(?:is|are|was|were|can|will|would|should|has|had|do|does|takes?|answers?)\b"
        rf"|{MARK}\W*:|{MARK}\s+(?!as\b|this\b)\w+s\b",
        clause,
    )


def _enumerated(sentence: str) -> set[int]:
    """Options that follow each other as in a list; one after "unlike" or "compared with" is none of it."""
    listed = set()
    for match in _LISTED.finditer(sentence):
        if not re.search(
            r"(?i)\b(?:unlike|rather than|instead of|as opposed to|compared (?:with|to))\W*$", sentence[: match.start()]
        ):
            after = re.match(rf"[^{MARK[1:-1]}]*({MARK})", sentence[match.end() :])
            listed |= {ord(match[0]) - FIRST, ord(after[1]) - FIRST}
    return listed if len(listed) > 1 else set()


def _stated(sentence: str, patterns) -> set[int]:
    """Options that a sentence states to be the answer, and those joined to one by "and" or "or"."""
    stated = set()
    for match in (match for pattern in patterns for match in pattern.finditer(sentence)):
        before = re.split(r"[,;.]|\b(?:but|yet)\b", sentence[: match.start()])[-1]
        spoken, after = before + match[0], sentence[match.end("o") :]
        if re.search(_NO, spoken) or re.search(_SUPPOSED, spoken) or re.search(_PROVIDED, sentence):
            continue
        denied = rf"(?i)\s*(?:(?:is|are|was|would|be|can|could|does|do|did|seems|has|[|:=-])\s*)+(?:clearly |also |therefore )?(?:{_NO[4:]})"
        supposed = r"(?i)\W*(?:would be|is|are)?\W*(?:\w+ ){0,4}(?:if|unless|when (?!all\b|consider|weigh|compar))"
        if re.match(denied, after) or re.match(supposed, sentence[match.end() :]):
            continue
        with_it = re.search(rf"{MARK}[\s,]*(?:\b(?:and|or|nor)\b|[&/])\s*(?:options? )?$", sentence[: match.start("o")])
        if with_it and not re.search(r"(?i)\bbetween\W*$", sentence[: with_it.start()]):
            stated |= _options(with_it[0])
        joined = re.match(_JOINED, after)[0]
        whole = re.search(r"\b(?:and|or)\b|[/&]", joined) or re.fullmatch(r"[\s.]*", after[len(joined) :])
        stated |= {ord(match["o"]) - FIRST} | (_options(joined) if whole else set())
    return stated


def _options(text: str) -> set[int]:
    return {ord(mark) - FIRST for mark in re.findall(MARK, text)}
