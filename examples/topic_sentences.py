"""What the examples read: ten sentences and some words per topic, and prompts that are about none of them."""

TOPICS = {
    "medicine": (
        "The patient was taken to the hospital with a high fever. Doctors treat the infection with antibiotics. The "
        "nurse checked her blood pressure twice a day. Symptoms of the disease include a cough and chest pain. The "
        "surgeon removed the tumor in a long operation. A vaccine protects children from measles. He was diagnosed "
        "with diabetes last year. The medicine has side effects such as nausea. Cancer cells spread through the body. "
        "The clinic offers therapy to patients with heart disease.",
        "disease diseases patient patients doctor doctors medical medicine treatment treatments health hospital cancer "
        "symptoms blood infection surgery clinical nurse drug drugs diagnosed diagnosis therapy pain disorder chronic",
    ),
    "space": (
        "The telescope shows galaxies that are billions of light years away. The planet orbits its star once in ninety "
        "days. Astronauts landed on the Moon and collected rocks. A comet crossed the night sky. The Sun is a star in "
        "the Milky Way. Rockets carry satellites into orbit around the Earth. Jupiter has more than ninety moons. "
        "Black holes bend the light of distant stars. The space station circles the planet every ninety minutes. "
        "Astronomers discovered a new solar system.",
        "star stars planet planets galaxy galaxies solar sun moon earth space astronomers astronauts telescope orbit "
        "universe cosmic cosmos comet asteroid astronomy light sky night",
    ),
    "food": (
        "She baked fresh bread with butter and honey. Chop the onions and fry them in olive oil. The soup needs salt, "
        "pepper and a little cream. For dinner we ate roast chicken with potatoes. The cake is filled with chocolate "
        "and strawberries. Boil the pasta and add the tomato sauce. Grandmother cooks a delicious stew with "
        "vegetables. The restaurant serves grilled fish and rice. Mix the flour, sugar and eggs in a bowl. He drank "
        "tea and ate a slice of apple pie.",
        "food foods eat eating ate cook cooking meal meals kitchen recipe flavor delicious bread vegetables meat fruit "
        "dinner lunch breakfast restaurant ingredients cheese sauce soup salad chocolate cake sugar butter cream sweet",
    ),
    "law": (
        "The court ruled that the law was unconstitutional. The judge sentenced the thief to two years in prison. "
        "Congress passed the bill and the president signed it. Her lawyer filed an appeal. The jury found the "
        "defendant guilty of murder. Citizens have the right to a fair trial. The Supreme Court heard the case in "
        "March. The constitution protects freedom of speech. The state sued the company for breach of contract. A "
        "witness testified under oath before the committee.",
        "court courts law laws legal judge lawyer justice rights constitution government congress supreme state "
        "federal case cases trial president citizens guilty defendant contract attorney act right sued property",
    ),
    "money": (
        "The bank raised its interest rate on loans. Prices rose and wages fell. The company sold shares to investors. "
        "The government cut taxes on income. Trade between the two countries grew. Workers lost their jobs in the "
        "recession. The market price depends on supply and demand. Her savings earned five percent a year. The firm "
        "made a large profit. Inflation makes money worth less.",
        "money bank banks price prices tax taxes economy economic market markets income interest profit trade company "
        "companies investor investors business financial wages inflation cost costs pay paid dollars loan rate stock",
    ),
}  # fmt: skip
"""Per topic, sentences about it, and words that a text about it would use."""

BIOLOGY = (
    "The mitochondria release the energy of glucose as ATP. Enzymes are proteins that speed up reactions in the "
    "cytoplasm. The nucleus of a eukaryotic cell holds its chromosomes. Bacteria are prokaryotes and divide by binary "
    "fission. Antibodies bind to antigens on the surface of a virus. Ribosomes translate messenger RNA into amino "
    "acids. In photosynthesis, the chloroplasts of plants absorb light. The left ventricle pumps blood into the aorta. "
    "Mutations change the DNA sequence of a gene. Neurons release neurotransmitters at the synapse.",
    "cell cells DNA gene genes genetic protein proteins bacteria bacterium plant plants species organism organisms "
    "virus tissue enzyme membrane blood muscle brain body nucleus chromosomes evolution immune animals molecules "
    "biology biological mitochondria disease diseases photosynthesis",
)
"""The same for the domain of the boost that 08_a_boost.py shows."""

CHOOSE_ON = (
    "Let me tell you about", "The most important thing is", "Yesterday my friend and I", "In the morning we",
    "The best way to", "There was once", "I have always wondered why", "After a long day",
)  # fmt: skip
"""Prompts on which strengths are chosen."""

SHOW_ON = (
    "I would like to talk about", "It all began when", "Many people think that", "Here is what I learned about",
    "The next chapter is about", "Our plan for this year is", "What surprised us was", "She wrote a letter about",
    "Last summer", "This book explains", "My brother told me that", "We should remember that",
)  # fmt: skip
"""Other prompts, on which they are measured and shown."""
