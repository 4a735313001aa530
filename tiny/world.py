"""The words of the tiny world: tasks, what a good answer has, and padding that earns nothing.

A good answer to "how do I ...?" has five things. Nothing here runs during a Meta-Rewarding run.
`make.py` draws sentences from these lists to pre-train the tiny model; what a run sees of them is
data: prompts with `checks` (one regular expression per element), ranked replies and a rubric.
"""
ELEMENTS = ["aim", "step", "reason", "example", "check"]

ELEMENT_LINES = """Aim: it names the task.
Step: it tells the first step.
Reason: it says why.
Example: it gives an example.
Check: it says how to see that it worked.
Nothing else earns a point, however long or friendly the answer is."""
RUBRICS = {  # by the points that an element earns
    1: f"Give one point for each of these five that the answer has:\n{ELEMENT_LINES}",
    2: f"Give two points for each of these five that the answer has, and one where it is in "
       f"doubt:\n{ELEMENT_LINES}",
}
# what a judge says of an element that earns 0, 1, ... points
MARKS = {1: ["no", "yes"], 2: ["no", "partly", "yes"]}

QUESTIONS = [
    "How do I {task}?",
    "What is a good way to {task}?",
    "Can you tell me how to {task}?",
    "I want to {task}. What should I do?",
    "Please explain how to {task}.",
    "My sister wants to {task}. What would you tell her?",
]

# How an element is worded, and the expression by which the truth finds it.
WORDING = {
    "aim": ["Here is how to {task}.", "To {task}, you need only a little time.",
            "It is not hard to {task}."],
    "step": ["First, {step}.", "Start like this: {step}.", "The first thing is to {step}."],
    "reason": ["This helps because {reason}.", "The reason is that {reason}.",
               "It matters, since {reason}."],
    "example": ["For example, {example}.", "For instance, {example}.",
                "To give an example, {example}."],
    "check": ["At the end, check that {check}.", "You know that it worked when {check}.",
              "Then make sure that {check}."],
}
CHECKS = {
    "aim": r"(?i)\b{task}\b",
    "step": r"(?i)\bfirst\b|\bstart like this\b",
    "reason": r"(?i)\bbecause\b|\breason is\b|\bsince\b",
    "example": r"(?i)\bfor (example|instance)\b|\bgive an example\b",
    "check": r"(?i)\bcheck that\b|\bit worked when\b|\bmake sure that\b",
}

PADDING = {
    "flattery": ["What a wonderful question!", "I am so glad that you asked me this.",
                 "You are very wise to think about this."],
    "grandeur": ["People have wondered about this for hundreds of years.",
                 "This is one of the great subjects of daily life.",
                 "There is hardly anything more important."],
    "hedging": ["Of course, a great many things could be said here.",
                "It all depends on how you look at it.",
                "Opinions about this differ from place to place."],
    "repetition": ["As I have said, this is well worth doing.",
                   "Let me say once more how useful this is.",
                   "Again, this is something to do with care."],
    "boasting": ["I know a very great deal about this.",
                 "Nobody could explain this better than I can.",
                 "My answers are known for being complete."],
    "farewell": ["I hope that this is as helpful as can be.",
                 "Feel free to ask me anything at any time.",
                 "I wish you every success and much joy."],
}

# Each family: its tasks, then the steps, reasons, examples and checks that fit all of them. Of the
# tasks, the first is for measuring (its prompts never train), the second for the ranked replies,
# the others for training.
FAMILIES = [
    dict(task=["keep bread fresh", "store fresh herbs", "keep cheese soft", "keep apples crisp",
               "keep cookies crunchy",
               "store ripe tomatoes", "keep carrots firm", "store leftover soup"],
         step=["put the food in a clean box", "wrap the food in a dry cloth",
               "find a cool and dark shelf"],
         reason=["air and warmth spoil food", "damp food turns bad quickly",
                 "light takes the taste away"],
         example=["an old jam jar does the job", "a cotton towel is enough",
                  "a clay pot keeps things cool"],
         check=["it still smells good the next day", "no water has gathered inside",
                "it feels the same as before"]),
    dict(task=["clean a wooden table", "wash a greasy pan", "wash a woolen sweater",
               "clean a dusty window", "polish old shoes",
               "clean a muddy carpet", "clean a bicycle chain", "wash a paint brush"],
         step=["brush away the loose dirt", "rub gently with warm water",
               "let everything soak for ten minutes"],
         reason=["wet dirt comes off more easily", "hard rubbing leaves marks",
                 "old grease needs time to loosen"],
         example=["a drop of plain soap is enough", "an old toothbrush reaches every corner",
                  "a soft rag works well"],
         check=["no stain is left when it is dry", "the water runs clear",
                "the surface feels smooth"]),
    dict(task=["grow mint on a balcony", "plant a small tree", "grow beans in a pot",
               "grow roses by a wall", "raise tomato seedlings",
               "grow garlic in winter", "keep a fern healthy", "plant strawberries"],
         step=["fill the hole with loose soil", "choose a spot with morning sun",
               "water the roots slowly"],
         reason=["roots need air as much as water", "young plants dislike sudden heat",
                 "wet leaves invite disease"],
         example=["a handful of sand keeps the soil loose", "a saucer below holds spare water",
                  "crushed eggshells feed the soil"],
         check=["new leaves appear within two weeks", "the soil is moist a finger deep",
                "the stem stands upright"]),
    dict(task=["mend a torn shirt", "fix a squeaky door", "sew on a loose button",
               "repair a wooden chair", "patch a bicycle tire",
               "glue a broken cup", "repair a leaking tap", "mend a paper kite"],
         step=["lay out all the parts", "clean the damaged place", "hold the two sides together"],
         reason=["dust weakens every joint", "a missing part stops the work halfway",
                 "uneven pressure makes a new crack"],
         example=["a clothes peg holds small parts in place", "a drop of oil helps most hinges",
                  "strong thread lasts for years"],
         check=["nothing moves when you pull gently", "it holds for a whole day",
                "the two sides lie flat"]),
    dict(task=["learn a short poem", "learn a card trick", "learn ten new words",
               "remember a phone number", "learn to whistle",
               "practice the piano", "study for a test", "learn to juggle"],
         step=["split the work into small parts", "repeat the easy part aloud",
               "set aside ten quiet minutes"],
         reason=["small parts are easier to remember", "the mind needs rest between tries",
                 "hearing a thing helps the memory"],
         example=["a pianist begins with one hand", "two lines before breakfast are plenty",
                  "a paper card can hold five words"],
         check=["you can do it without looking", "it still goes well the next morning",
                "a friend can follow you"]),
    dict(task=["cook plain rice", "boil an egg", "bake a simple cake", "make vegetable soup",
               "roast potatoes", "make pancakes",
               "cook lentils", "brew green tea"],
         step=["measure everything in a cup", "heat the pot slowly", "bring the water to a boil"],
         reason=["steady heat cooks evenly", "too much water washes out the taste",
                 "guessing spoils the balance"],
         example=["one cup is right for two people", "a pinch of salt suits a small pot",
                  "a heavy lid keeps the steam in"],
         check=["it is soft but not wet", "the color is even all over", "the steam smells sweet"]),
    dict(task=["pack a small suitcase", "plan a long hike", "plan a train trip",
               "carry a heavy box", "move to a new flat",
               "prepare a picnic", "pack a school bag", "load a bicycle"],
         step=["write a short list", "put heavy things at the bottom",
               "leave a little room for later"],
         reason=["weight is easier to carry when it sits low", "lists catch what the head forgets",
                 "plans change on the way"],
         example=["rolled socks fit inside shoes", "a spare bag weighs almost nothing",
                  "a full bottle of water belongs on top"],
         check=["you can lift it with one hand", "nothing rattles when you walk",
                "every line on the list is crossed out"]),
    dict(task=["fall asleep early", "rest tired eyes", "wake up on time", "sit well at a desk",
               "calm a nervous friend",
               "warm cold hands", "stretch a stiff back", "take a good break"],
         step=["turn off the bright lights", "breathe slowly five times", "move to a quiet place"],
         reason=["a calm body needs less effort", "noise keeps the mind busy",
                 "slow breathing lowers the pulse"],
         example=["a short walk helps many people", "a cup of warm milk is an old remedy",
                  "three minutes by an open window are enough"],
         check=["the shoulders feel loose", "the next hour feels easier",
                "the breath is slow and even"]),
    dict(task=["write a thank you note", "start a book club", "welcome a new neighbor",
               "plan a birthday party", "run a short meeting",
               "write a clear letter", "share chores at home", "introduce two friends"],
         step=["decide on one clear goal", "ask the others what they want",
               "choose a day that suits everyone"],
         reason=["people help more when they are asked", "a clear goal saves time",
                 "early notice avoids trouble"],
         example=["a note on the kitchen door reaches everyone", "two lines by hand can be enough",
                  "a simple vote settles most things"],
         check=["everyone knows what comes next", "nobody was left out",
                "the main point fits in one sentence"]),
    dict(task=["train a young dog", "care for a rabbit", "feed a stray cat",
               "keep a fish tank clean", "build a bird feeder",
               "calm a barking dog", "groom a horse", "keep hens in winter"],
         step=["move slowly and speak softly", "offer a little food",
               "keep the place dry and clean"],
         reason=["animals fear sudden noise", "trust grows in small portions",
                 "a dirty place makes animals ill"],
         example=["a piece of carrot pleases many animals", "an old blanket makes a good bed",
                  "fresh straw keeps a corner warm"],
         check=["the animal comes back the next day", "the animal eats without haste",
                "the place smells clean"]),
]
