"""Topics: sentences on five things, the first four of each to fit on, four to be found, and four to ask with."""

from __future__ import annotations

TOPICS = {
    "sea": """The waves broke over the deck all night.
Fishermen sail out before the sun is up.
A whale came up beside the small boat.
The tide covers the rocks twice a day.
The lighthouse warned ships off the reef.
We dived down to the coral and its fish.
The harbour smelled of salt and diesel.
A storm drove the ferry back to port.
The captain changed course to avoid the ice.
Dolphins followed us across the bay.
The anchor would not hold in the sand.
She collects shells along the shore.""",
    "cooking": """Fry the onions in butter until they are golden.
The soup needs a little more salt.
Let the dough rise for an hour before you bake it.
He grated cheese over the hot pasta.
Roast the potatoes with garlic and rosemary.
The sauce thickens as it simmers.
She whisked the eggs with sugar and milk.
Slice the carrots thinly and steam them.
My grandmother's stew takes all afternoon.
Preheat the oven and grease the tin.
Add the spices to the pan one by one.
The cake is done when it springs back.""",
    "music": """The violins tune before the concert begins.
He practises scales on the piano every morning.
The choir sang the last hymn very softly.
She wrote a song for three guitars.
The drummer kept a steady beat.
The orchestra played a symphony by Mahler.
This record was pressed in the sixties.
The singer could not reach the high note.
A saxophone solo opens the second track.
The conductor raised her baton.
They rehearse their new album in a garage.
The melody returns in a minor key.""",
    "football": """The striker scored in the last minute.
The referee showed him a red card.
Their goalkeeper saved two penalties.
The fans sang as the team left the pitch.
She passed the ball back to the midfield.
The match ended without a goal.
The coach changed three players at half time.
Our club was promoted to the first league.
He was offside by half a metre.
The derby sold out within an hour.
A free kick hit the crossbar.
The captain lifted the trophy.""",
    "money": """The bank raised its interest rate again.
Shares fell sharply after the report.
She pays her rent at the start of the month.
The company could not repay its loan.
Inflation eats up their savings.
He invested everything in bonds.
The tax office sent a second letter.
The price of gold has doubled.
The budget does not add up this year.
They opened an account for their daughter.
The dividend will be paid in spring.
The currency lost a tenth of its value.""",
}
FIT, FOUND, ASK = (slice(start, start + 4) for start in (0, 4, 8))


def sentences(part: slice) -> dict[str, list[str]]:
    """Topic -> its sentences of one part."""
    return {topic: text.splitlines()[part] for topic, text in TOPICS.items()}
