"""The wording of every task that is answered by choosing: data, no code.

SuperGLUE as cloze questions to a causal model, close to those of GPT-3 (arXiv 2005.14165, appendix G): what is to be
filled in stands last, since nothing after it is seen. Options begin with a space, as words in a sentence do.
"""

from worker_client.evaluation.cases import Template

_YES_NO = {"yes": " yes", "no": " no"}

BOOLQ = Template("{passage}\nquestion: {question}?\nanswer:", _YES_NO)

CB = Template(
    "{premise}\nquestion: {hypothesis}. true, false, or neither?\nanswer:",
    {"entailment": " true", "contradiction": " false", "neutral": " neither"},
)

COPA = Template("{premise} {connective}", {"0": " {choice1}", "1": " {choice2}"})

MULTIRC = Template(
    "{passage}\nquestion: {question}\nanswer: {answer}\nIs this answer correct, yes or no?\nanswer:", _YES_NO
)

# The whole rest of the sentence is scored with each candidate in its place.
RECORD = Template("{passage}\n{before}", "{space}{name}{after}")

RTE = Template(
    "{premise}\nquestion: {hypothesis} True or False?\nanswer:", {"entailment": " True", "not_entailment": " False"}
)

WIC = Template(
    "{sentence1}\n{sentence2}\n"
    "question: Is the word '{word}' used in the same way in the two sentences above?\nanswer:",
    _YES_NO,
)

WSC = Template(
    "Passage: {text}\nquestion: In the passage above, does the pronoun '{pronoun}' refer to '{noun}'?\nanswer:", _YES_NO
)

SST2 = Template("{sentence}\nThe sentiment of this review is", {"1": " positive", "0": " negative"})

AGNEWS = Template(
    "{title}\n{description}\nThis news is about", {"1": " world", "2": " sports", "3": " business", "4": " technology"}
)

# For summaries: what the model continues.
SUMMARY = "{document}\n\nTL;DR:"
