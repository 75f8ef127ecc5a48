"""The texts, written for this reference, of templates and words: what is fitted, what chooses, what reports."""

from __future__ import annotations

from itertools import product


def _every(template: str, *words: str) -> list[str]:
    """The template with every combination of words, which are given in one string for each gap."""
    return [template.format(*chosen) for chosen in product(*(own.split(", ") for own in words))]


# --- sentiment: the texts of a pair differ in the middle alone, and end in the same words ----------------------------
_OPENINGS = (
    ("I enjoyed every minute of the {}", "I regretted every minute of the {}"),
    ("The {} made all of us laugh and sing", "The {} made all of us cry and shout"),
    ("We were thankful for the {}", "We were furious about the {}"),
    ("The {} was a dream come true", "The {} was a nightmare come true"),
    ("She praised the {} and asked for more", "She cursed the {} and asked for her money"),
    ("He left the {} with a smile", "He left the {} with a headache"),
    ("Everybody applauded the {}", "Everybody complained about the {}"),
    ("The {} was a triumph from start to finish", "The {} was a failure from start to finish"),
)
PAIRS = [
    (positive.format(subject) + tail, negative.format(subject) + tail)
    for (positive, negative), subject, tail in product(
        _OPENINGS,
        ("dinner", "concert", "journey", "lesson"),
        (", and it felt", ". In one word, the whole thing was", ", because it was so"),
    )
]
"""(positive, negative)"""
GOOD = _every(
    "{}",
    "good, great, wonderful, excellent, amazing, beautiful, perfect, fantastic, lovely, delightful, brilliant, "
    "pleasant",
)
BAD = _every(
    "{}",
    "bad, terrible, awful, horrible, poor, ugly, dreadful, disappointing, boring, unpleasant, worse, miserable",
)
"""Of these the probability as the next word is summed; none of them is in a pair."""
CHOOSE = _every(
    "{} {}",
    "The hotel by the lake, My first week at work, The soup they served, Our new teacher, The last chapter",
    "was, turned out to be, seems quite, is really",
)
REPORT = _every(
    "{} {}",
    "The bridge over the canal, My sister's wedding, The coffee in the canteen, That old song, "
    "Our holiday in the hills, "
    "The second half of the match, The museum's new wing, His answer to the letter, The road to the village, "
    "Working from home",
    "was, felt, had become very",
)
ENDINGS = [
    ("She opened the letter and", " smiled with joy.", " burst into tears."),
    ("When the results came in, the whole team", " cheered and hugged.", " sat in silence and despair."),
    ("The critics wrote that the play was", " a delight.", " a waste of time."),
    ("After the first bite he said that it was", " delicious.", " disgusting."),
    ("The guests went home", " happy and grateful.", " angry and tired."),
    ("At the end of the day the children were", " full of joy.", " in tears."),
    ("The new manager turned out to be", " kind and fair.", " rude and lazy."),
    ("Looking back, I think that moving here was", " the best choice of my life.", " the worst mistake of my life."),
    ("The doctor came back and told us that", " everything was fine.", " there was no hope."),
    ("Her first words on the stage were met with", " loud applause.", " cold silence."),
    ("The dog came up to the stranger and", " wagged its tail.", " bit him in the leg."),
    ("They walked along the beach, and the evening was", " warm and peaceful.", " cold and lonely."),
]
"""(the beginning, a happy ending, an unhappy one)"""
NEUTRAL = [
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "The meeting was moved to Thursday because the room was taken.",
    "Two plus two is four, and four plus four is eight.",
    "The train leaves at nine from the main station and stops in three towns.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "The library has three floors, and the reading room is on the second.",
    "A triangle has three sides, and its angles add up to one hundred and eighty degrees.",
    "The Earth moves around the Sun once in a year.",
    "To change the password, open the settings and click on the second tab.",
    "The form has to be signed by both parties and sent to the office by post.",
    "Iron is a metal that is used to make steel.",
    "The museum is open from ten to six on every day but Monday.",
    "The committee consists of twelve members, who are elected for four years.",
    "In the northern half of the world the days are longest in June.",
    "The function takes two numbers as its input and returns their sum.",
    "The bus turns left at the bridge and follows the road to the airport.",
    "A dictionary lists the words of a language in alphabetical order.",
    "The house was built in 1920 and has a roof of red tiles.",
    "Copper wires carry the current from the plant to the city.",
    "The first column of the table shows the date, and the second the amount.",
]
"""Of which the perplexity is."""
KEPT = [
    "The post office closes at five.",
    "A square has four equal sides.",
    "The lift stops on every floor.",
    "Paper is made from wood.",
    "The list is sorted by name.",
    "The Moon moves around the Earth.",
    "The road leads to the north.",
    "Ten minus three is seven.",
    "The key is in the top drawer.",
    "The report has two parts.",
    "Glass is made from sand.",
    "The shop sells nails and screws.",
]
"""Neutral too: by these `calibrate` bounds the cost, and random directions are drawn like their activations."""
PROMPTS = {
    "answer cheerfully": "Answer cheerfully. ",
    "answer gloomily": "Answer gloomily. ",
    "here is a text": "Here is a text. ",
}
"""What a user could write in front in the place of steering; and, to compare these with, what says nothing."""
QUESTIONS = [
    "How was your day?",
    "Tell me about a walk in the park.",
    "Describe a small hotel by the sea.",
    "Write two sentences about my new neighbours.",
    "What do you think of Mondays?",
    "Tell me how the school concert went.",
]

# --- a topic: cooking, against everything else -----------------------------------------------------------------------
TAIL = ", and it was"
"""With this every prompt ends, where a good or a bad word is to come."""
COOKING = [
    *_every("We {} the {} for dinner", "baked, boiled, fried, roasted, steamed", "potatoes, fish, onions"),
    *_every("I tried the {} with {}", "soup, pasta, salad, cake, curry", "tomatoes, cream, fresh herbs"),
    "He chopped the vegetables for the sauce",
    "She kneaded the dough for an hour",
]
OTHER = [
    *_every("We {} the {} for the neighbours", "painted, repaired, sold, moved", "chairs, bicycle, fence"),
    *_every("I read the {} about {}", "book, article, report, letter", "the election, a war, old ships"),
    *_every("She {} in {}", "lives, works, studied, got lost", "Madrid, the old town"),
]
"""By these the gate is fitted."""
OTHER_KEPT = [
    *_every("The {} in {} is older than I thought", "bridge, church, theatre", "Rome, Oslo, our town"),
    *_every("He explained {} to {}", "gravity, inflation, chess", "a child, my uncle, the class"),
    *_every("My {} starts {} next week", "course, new job, trial", "again, early, in London"),
    *_every("She locked the {} before {}", "door, shed, office", "noon, the storm, we left"),
    *_every("They {} the {} on Sunday", "watched, recorded, cancelled", "match, parade, play"),
]
"""By these its threshold is set."""
COOKING_HELD_OUT = [
    *_every("The recipe asked for {} and {}", "flour, milk, rice", "sugar, a lemon, garlic"),
    *_every("My grandmother stirred the {} in the {}", "stew, beans, jam", "pan, big pot"),
    *_every("He grilled {} over the fire", "the sausages, some corn, the trout"),
    "The chef served lamb with mint",
    "We put the pie in the oven",
]
OTHER_HELD_OUT = [
    *_every("The bank asked for {} and {}", "two letters, a photograph", "a signature, my passport"),
    *_every("My grandmother parked the {} in the {}", "car, tractor, van", "garage, big yard"),
    *_every("He wrote {} over the summer", "two songs, his thesis, a novel"),
    "The pilot landed in the fog",
    "They ate in a hurry and ran to the station",
    "The factory roasts coffee for half of the country",
    "He was fried after twelve hours at the desk",
    "The stew of reforms left the voters cold",
    "She bakes in the sun every summer on that beach",
    "The fire in the kitchen was put out with foam",
]
"""On these it is reported; the last six have the words of a kitchen, and are not about cooking."""

# --- apologies: what a model of text cannot do, and what it can ------------------------------------------------------
IMPOSSIBLE = [
    *_every("{} the {} in my {}.", "Turn off, Open, Check", "lights, window", "kitchen, office, bedroom"),
    *_every("{} my {} and say that I am late.", "Call, Send an email to, Phone", "mother, boss, neighbour"),
    *_every("Book me a {} for {}.", "table, taxi, flight", "tonight, tomorrow"),
    *_every("Play {}.", "my favourite song, the radio, a film for me"),
]
POSSIBLE = [
    *_every("{} the {} of {}.", "Explain, Describe, Name", "history, colours", "Rome, the rainbow, flags"),
    *_every("Write a {} about {}.", "poem, short story, letter", "the sea, my cat, autumn"),
    *_every("Give me three {} for {}.", "names, ideas, tips", "a dog, a party"),
    *_every("What is {}?", "a volcano, the capital of Italy, a verb"),
]
IMPOSSIBLE_HELD_OUT = [
    *_every("{} my {} to the station.", "Bring, Drive", "car, suitcase, grandfather"),
    *_every("Order {} for {}.", "a pizza, new shoes, flowers", "me, my wife"),
    "What did I eat for breakfast today?",
    "Who is standing behind me?",
]
POSSIBLE_HELD_OUT = [
    *_every("{} how a {} works.", "Explain, Tell me", "bicycle, clock, mill"),
    *_every("List three {}.", "animals, rivers, jobs, fruits, colours, games"),
    "How many days has a week?",
    "What is the opposite of cold?",
]
APOLOGY = "I'm sorry"
"""How SmolLM2 begins where it says that it cannot."""

# --- a prompt to distil ----------------------------------------------------------------------------------------------
SYSTEM = "You are a pirate. Answer every question as a pirate would."
TAUGHT = [
    *_every("Tell me about {}.", "the sea, cats, trains, winter, music, bread, schools, the moon, markets, football"),
    *_every("What is {} good for?", "salt, sleep, a bicycle, a garden, a map, rain"),
    *_every("Describe {}.", "a forest, a city at night, your friend, a long journey, a kitchen, a storm"),
]
ASKED = [
    *_every("Tell me about {}.", "horses, the desert, radio, tea, bridges"),
    *_every("What is {} good for?", "paper, a dog, laughter, snow"),
    *_every("Describe {}.", "a harbour, a library, an old house, a picnic"),
]
