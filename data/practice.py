"""Practice problems: word problems in the form of GSM-8K, in our own text, made from templates.

For a machine without the data: several steps, a calculator annotation in each, `#### answer` at the end. Deterministic
by seed; no question is in both splits. `python -m data.practice` shows three.
"""
import random
import re
import zlib

from data.calculator import calculate

# {a:2-9} draws a number, {a:10-50/5} one of 10, 15, ... 50, and {a} repeats it. [c = a*b] computes a further number and
# is written as `3*4 = <<3*4=12>>12`. The lines before the first such step are the question.

TEMPLATES = """
{ann} baked {a:12-96/2} {food}s on Saturday and half as many {food}s on Sunday. How many {food}s did {she} bake in all?
{ann} baked [b = a/2] {food}s on Sunday.
In all {she} baked [c = a+b] {food}s.

{ann} buys {a:2-9} {item}s for ${p:2-5} each and {b:2-9} {item2}s for ${q:2-5} each. {She} pays with a $100 bill.
How many dollars does {she} get back?
The {item}s cost $[c = a*p].
The {item2}s cost $[d = b*q].
Together that is $[e = c+d].
So {she} gets back $[f = 100-e].

The price of a {gear} is ${a:20-200/10}, but this week it is {p:10-50/10}% lower.
How many dollars does {ann} pay for {n:2-6} {gear}s this week?
One {gear} is cheaper by $[b = a*p/100].
So it costs $[c = a-b].
For {n} {gear}s {ann} pays $[d = n*c].

{ann} earns ${p:10-30/2} an hour for the first 40 hours of a week, and half as much again for every further hour.
Last week {she} worked {h:42-60} hours. How many dollars did {she} earn?
{She} worked [a = h-40] further hours.
For each of these {she} was paid $[b = p*1.5].
The first 40 hours brought $[c = 40*p].
The further hours brought $[d = a*b].
So {she} earned $[e = c+d].

{ann} wants to buy a {gear} that costs ${g:80-240/10}. {She} has ${s:10-70/10} and saves ${w:5-10/5} every week.
How many weeks must {she} save?
{ann} still needs $[r = g-s].
That takes [n = r/w] weeks.

{ann} reads a book of {a:120-400/10} pages: {b:10-40/10} pages on Monday, twice as many on Tuesday, and the rest in
{d:3-6} days, equally many on each. How many pages does {she} read on each of these days?
On Tuesday {ann} reads [c = 2*b] pages.
By then {she} has read [e = b+c] pages.
There are [f = a-e] pages left.
So {she} reads [g = f/d] pages on each of the other days.

{ann}'s {a:10-60/5} hens lay {b:3-7} eggs each in a week. {She} eats {c:5-30/5} eggs and sells the others
for {p:20-60/20} cents each. How many dollars does {she} take in a week?
The hens lay [d = a*b] eggs a week.
{ann} sells [e = d-c] of them.
That brings [f = e*p] cents.
This is $[g = f/100].

Of {a:40-400/20} students on a trip, {p:10-60/10}% come by bus and 1/{k:2-4} of the others by train. The rest walk.
How many students walk?
[b = a*p/100] students come by bus.
The other students are [c = a-b].
Of these, [d = c/k] come by train.
So [e = c-d] students walk.

A train runs at {v:30-90/5} miles per hour for {a:2-6} hours, and then at {w:30-90/5} miles per hour for {b:2-6} hours.
How many miles does it run in total?
First the train runs [c = v*a] miles.
Then it runs [d = w*b] miles.
In total it runs [e = c+d] miles.

{ann} is {a:4-15} years old. {bob} is {k:2-4} times as old as {ann}, and {cy} is {d:2-9} years younger than {bob}.
How old will {cy} be in {y:2-12} years?
{bob} is [b = k*a] years old.
So {cy} is [c = b-d] years old.
In {y} years {cy} will be [e = c+y] years old.

{ann} and {bob} share ${t:60-600/60} in the ratio {a:2-4}:{b:5-9}. How many dollars more does {bob} get than {ann}?
There are [n = a+b] parts.
Each part is $[p = t/n].
{bob} gets [c = b-a] parts more than {ann}.
That is $[d = c*p].

A tank for {c:60-600/60} gallons of water is 1/{k:2-4} full. A pump brings {a:8-14} gallons a minute,
but {b:2-4} gallons a minute leak out. In how many minutes will the tank be full?
There are [d = c/k] gallons in the tank.
So [e = c-d] gallons are missing.
Every minute the tank gains [f = a-b] gallons.
It will be full in [g = e/f] minutes.

There are {a:3-30} ducks on {ann}'s farm, and {k:2-6} times as many {animal}s. How many legs do all these animals have?
There are [b = k*a] {animal}s.
The ducks have [c = 2*a] legs.
The {animal}s have [d = 4*b] legs.
Together they have [e = c+d] legs.

{ann} gave half of {her} {thing}s to {bob} and then {b:3-20} {thing}s to {cy}. Now {she} has {c:2-40} {thing}s left.
How many {thing}s did {she} have in the beginning?
Before {she} gave {cy} any, {ann} had [d = b+c] {thing}s.
This was half of {her} {thing}s, so in the beginning {she} had [e = 2*d] {thing}s.

In {ann}'s garden grow {a:20-120/4} {flower}s, and {p:25-75/25}% more {flower2}s than {flower}s.
{She} gives away 1/{k:2-3} of all these flowers. How many flowers are left?
There are [b = a*p/100] more {flower2}s than {flower}s.
So there are [c = a+b] {flower2}s.
That makes [d = a+c] flowers.
{ann} gives away [e = d/k] flowers.
So [f = d-e] flowers are left.

To rent a boat costs ${a:10-50/5} and ${b:5-20/5} more for each hour. {ann} and {n:2-5} friends rent it
for {h:2-6} hours and share the cost equally. How many dollars does each of them pay?
The {h} hours cost $[c = b*h].
The whole cost is $[d = a+c].
It is shared by [e = n+1] people.
So each pays $[f = d/e].

A theater has {a:10-40/5} rows of {b:12-32/4} seats, and {p:40-90/10}% of the seats are taken. How many seats are empty?
The theater has [c = a*b] seats.
Of these, [d = c*p/100] are taken.
So [e = c-d] seats are empty.

{ann} buys {n:12-80} {fruit}s for ${p:2-4} each and sells them all for ${q:6-9} each at a stand that costs ${r:5-40/5}.
What is {her} profit in dollars?
On each of the {fruit}s {ann} gains $[m = q-p].
On all of them {she} gains $[g = m*n].
The stand leaves a profit of $[h = g-r].

{ann} has {a:5-40} {thing}s. {bob} has {d:3-20} more, and {cy} has {k:2-4} times as many as {ann} and {bob} together.
How many {thing}s do the three have?
{bob} has [b = a+d] {thing}s.
{ann} and {bob} have [c = a+b] {thing}s together.
{cy} has [e = k*c] {thing}s.
The three have [f = c+e] {thing}s.

A bus leaves with {a:12-48/6} passengers. At the first stop 1/{k:2-3} of them get off and {b:2-15} people get on.
At the second stop {c:2-7} people get off and {d:2-12} get on. How many passengers are on the bus now?
At the first stop [e = a/k] passengers get off.
After that stop there are [f = a-e+b] passengers.
After the second stop there are [g = f-c+d] passengers.
"""
NUMBER_FIELD = re.compile(r"\{(\w):(\d+)-(\d+)(?:/(\d+))?\}")
STEP_FIELD = re.compile(r"(\$?)\[(\w) = (.*?)\]")
GIRLS = "Amelia Carla Dora Elena Fatima Grace Hana Irma Keiko Lucy Nadia Olga Priya Ruth Sofia Tara".split()
BOYS = "Adam Bruno Chen David Emil Farid George Henry Ivan Jonah Kenji Leo Omar Peter Samir Victor".split()
NOUNS = [("food", "cookie muffin cupcake bagel pancake pretzel"), ("item", "notebook pen ruler candle mug puzzle"),
         ("gear", "jacket tent bicycle guitar camera lamp"), ("thing", "marble sticker stamp button postcard shell"),
         ("animal", "cow goat horse pig rabbit donkey"), ("flower", "rose tulip violet sunflower daffodil marigold"),
         ("fruit", "melon lemon pineapple papaya pumpkin coconut")]
SIZES = {"train": 3000, "test": 500}


def practice(split, count=None, seed=0):
    """`count` generated examples of a split (default 3000 train, 500 test), always the same ones for the same seed.

    A checksum of its text decides which split a question belongs to: train and test share none, whatever the seeds.
    """
    rng = random.Random(seed)
    templates = TEMPLATES.strip().split("\n\n")
    examples = {}  # by question, so that none comes twice
    while len(examples) < (SIZES[split] if count is None else count):
        example = write_problem(rng.choice(templates), rng)
        if (zlib.crc32(example["question"].encode()) % 4 == 0) == (split == "test"):
            examples[example["question"]] = example
    return list(examples.values())


def write_problem(template, rng):
    """An example from a template, its numbers drawn anew until every step comes out well."""
    values = None
    while values is None:
        values = draw_numbers(template, rng)
    spacing = rng.choice((r"\1", r" \1 "))

    def write_step(step):
        dollar, name, formula = step.groups()
        expression = insert(values, formula)
        spaced = re.sub(r"([-+*/])", spacing, expression)
        return f"{spaced} = {dollar}<<{expression}={values[name]}>>{values[name]}"

    text = STEP_FIELD.sub(write_step, NUMBER_FIELD.sub(r"{\1}", template))
    lines = text.format(**values, **draw_words(rng)).split("\n")
    question = " ".join(line for line in lines if "<<" not in line)
    steps = [line for line in lines if "<<" in line]
    return {"question": question, "answer": "\n".join([*steps, "#### " + list(values.values())[-1]])}


def draw_numbers(template, rng):
    """Every number of a template by its letter; None where a result is not an integer, or below two.

    As nothing comes in ones, every plural is right.
    """
    values = {name: str(rng.randrange(int(low), int(high) + 1, int(step or 1)))
              for name, low, high, step in NUMBER_FIELD.findall(template)}
    for _, name, formula in STEP_FIELD.findall(template):
        values[name] = calculate(insert(values, formula))
        if "." in values[name] or int(values[name]) < 2:
            return None
    return values


def insert(values, formula):
    """The formula with its letters replaced by their values."""
    return re.sub(r"[a-z]", lambda letter: values[letter[0]], formula)


def draw_words(rng):
    """What the {words} of a template stand for: {item} and another {item2}, three people, pronouns of the first."""
    words = {}
    for kind, nouns in NOUNS:
        words[kind], words[kind + "2"] = rng.sample(nouns.split(), 2)
    words["ann"], words["bob"], words["cy"] = rng.sample(GIRLS + BOYS, 3)
    words["she"], words["She"], words["her"] = ("she", "She", "her") if words["ann"] in GIRLS else ("he", "He", "his")
    return words


if __name__ == "__main__":
    for problem in practice("train", 3):
        print(f"Question: {problem['question']}\nAnswer: {problem['answer']}\n")
