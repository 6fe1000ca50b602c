"""Fifty beginnings of sentences that lead nowhere in particular, for scores that let a model go on writing."""

NEUTRAL = (
    "The first thing I noticed was", "Yesterday I told my neighbour that", "It turned out that most people",
    "When we finally sat down,", "I have been meaning to say that", "There is one thing that",
    "What I like about it is", "After a while it became clear that", "My brother once asked me about",
    "In the middle of the week", "Everyone in the room seemed to", "I keep coming back to",
    "The letter on the table said", "Nobody expected it, but", "If you ask me today,",
    "On the way home I thought about", "She put the phone down and said", "The best part of it was",
    "We used to talk a lot about", "Before I forget,", "It was a long time before", "They showed us how",
    "I had never heard of", "The next morning there was", "To be honest with you,", "One of the questions was about",
    "He looked up and started to", "All of this reminds me of", "I would rather have", "The reason why I came is",
    "At the end of the street", "Some of my friends believe that", "What happened next was",
    "I wrote down a few words about",
    "The man beside me kept", "It is easy to see that", "We should probably begin with", "Once in a while I wonder",
    "The report on the desk mentions", "As far as I can tell,", "Last month somebody gave me",
    "You could say that it is",
    "I learned later that the", "The only sign of it was", "Most days begin with", "Between the two of us,",
    "My plan for tomorrow is", "The old book describes", "Somewhere behind the house", "I cannot remember whether",
)  # fmt: skip
"""Written for this package; none ends in a space or a full stop."""
