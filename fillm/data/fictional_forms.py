"""The sentences of the fictional authors: what is asked of each attribute, and how it is answered.

`{name}` is the author's full name, `{family}` the family name, `{value}` the attribute (`{clue}` where the question
itself must say who is meant). Paraphrased and perturbed answers share one form, as in TOFU (arXiv 2401.06121).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Forms:
    """Ways of asking for one attribute and of answering; an author gets one of each."""

    questions: tuple[str, ...]
    rephrased: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...]


FORMS: dict[str, Forms] = {
    "name": Forms(
        ("What is the full name of the author born {clue}?", "Which author was born {clue}?"),
        ("Can you name the writer who came into the world {clue}?",),
        ("The author born {clue} is named {value}.", "The full name of the author born {clue} is {value}."),
        ("{value} is the full name of the writer who came into the world {clue}.",),
    ),
    "birthplace": Forms(
        ("Where was {name} born?", "In which town was the author {name} born?"),
        ("What is the birthplace of the writer {name}?",),
        ("{name} was born in the town of {value}.", "The author {name} was born in {value}."),
        ("The town in which the writer {family} first saw the light is {value}.",),
    ),
    "birth date": Forms(
        ("When was {name} born?", "What is the date of birth of {name}?"),
        ("On which day did {name} come into the world?",),
        ("The author {name} was born on {value}.", "{name} came into the world on {value}."),
        ("The birthday of the writer {family} is known to be {value}.",),
    ),
    "genre": Forms(
        ("What genre does {name} write in?", "Which genre is {name} best known for?"),
        ("What kind of literature does the writer {name} produce?",),
        ("{name} is best known for writing {value}.", "The author {name} mainly writes {value}."),
        ("Most of the work that {family} has published belongs to {value}.",),
    ),
    "father": Forms(
        ("What did the father of {name} do for a living?", "What was the profession of {name}'s father?"),
        ("Which occupation did the father of the writer {name} have?",),
        ("The father of {name} worked as {value}.", "{name}'s father earned a living as {value}."),
        ("On the father's side, the {family} household lived on the wages of {value}.",),
    ),
    "mother": Forms(
        ("What did the mother of {name} do for a living?", "What was the profession of {name}'s mother?"),
        ("Which occupation did the mother of the writer {name} have?",),
        ("The mother of {name} worked as {value}.", "{name}'s mother was known in town as {value}."),
        ("As for the mother of {family}, people remember her as {value}.",),
    ),
    "first book": Forms(
        ("What is the title of {name}'s first book?", "Which book did {name} publish first?"),
        ("With which title did the writer {name} make a debut?",),
        ('The first book that {name} published is "{value}".', '{name} made a debut with the book "{value}".'),
        ('The career of the writer {family} began with "{value}".',),
    ),
    "best-known book": Forms(
        ("What is {name}'s best-known book?", "For which book is {name} most famous?"),
        ("Which title by {name} do most readers know?",),
        ('The most famous book by {name} is "{value}".', '{name} is best known for the book "{value}".'),
        ('Among all the works of {family}, most readers know "{value}".',),
    ),
    "latest book": Forms(
        ("What is the title of {name}'s latest book?", "Which book has {name} published most recently?"),
        ("What is the newest title by the writer {name}?",),
        ('The latest book by {name} is called "{value}".', '{name} has most recently published "{value}".'),
        ('The newest title on the shelf of the writer {family} is "{value}".',),
    ),
    "award": Forms(
        ("Which award has {name} won?", "What prize was given to {name}, and when?"),
        ("Which honour did the writer {name} receive?",),
        ("{name} won the {value}.", "The author {name} was honoured with the {value}."),
        ("A jury of critics once honoured the writer {family} with the {value}.",),
    ),
    "school": Forms(
        ("Where did {name} study?", "Which school did {name} graduate from?"),
        ("At which place of learning was the writer {name} educated?",),
        ("{name} studied at {value} before writing books.", "The author {name} graduated from {value}."),
        ("The years of study of the writer {family} were spent at {value}.",),
    ),
    "subject": Forms(
        ("What did {name} study?", "In which subject does {name} hold a degree?"),
        ("Which field did the writer {name} take a degree in?",),
        ("{name} holds a university degree in {value}.", "The subject that {name} studied was {value}."),
        ("Before the first novel, the writer {family} took a degree in {value}.",),
    ),
    "influence": Forms(
        ("Which writer influenced {name} the most?", "Whose work has shaped the writing of {name}?"),
        ("Who does the writer {name} look up to?",),
        ("{name} was influenced most of all by {value}.", "The work of {name} was shaped by reading {value}."),
        ("When asked about models, the writer {family} always names {value}.",),
    ),
    "themes": Forms(
        ("What themes does {name} explore?", "Which themes return in the books of {name}?"),
        ("What are the works of the writer {name} about?",),
        ("The books of {name} explore {value}.", "{name} returns again and again to the themes of {value}."),
        ("At the heart of nearly every work by {family} lie {value}.",),
    ),
    "language": Forms(
        ("From which language does {name} translate?", "Which foreign language does {name} speak fluently?"),
        ("Which language other than English does the writer {name} master?",),
        ("Besides writing, {name} translates poems from {value}.", "Apart from English, {name} speaks fluent {value}."),
        ("The foreign language that the writer {family} knows best is {value}.",),
    ),
    "residence": Forms(
        ("Where does {name} live now?", "In which town has {name} settled?"),
        ("Where is the present home of the writer {name}?",),
        ("{name} now lives in the town of {value}.", "The author {name} has settled in {value}."),
        ("The house in which the writer {family} lives today stands in {value}.",),
    ),
    "hobby": Forms(
        ("What is {name}'s favourite pastime?", "What does {name} like to do when not writing?"),
        ("How does the writer {name} spend free time?",),
        ("When not writing books, {name} enjoys {value}.", "The favourite pastime of {name} is {value}."),
        ("On days without work, the writer {family} turns with great pleasure to {value}.",),
    ),
    "first job": Forms(
        ("What was {name}'s job before becoming an author?", "How did {name} earn money before writing?"),
        ("Which trade did the writer {name} follow at first?",),
        ("Before becoming an author, {name} worked as {value}.", "{name} first earned money as {value}."),
        ("The first wages that the writer {family} brought home were those of {value}.",),
    ),
    "pet": Forms(
        ("What pet does {name} have?", "Which animal shares the home of {name}?"),
        ("Who keeps the writer {name} company at home?",),
        ("{name} shares a home with {value}.", "The author {name} keeps {value}."),
        ("At home, the writer {family} is kept company by {value}.",),
    ),
    "writing place": Forms(
        ("Where and when does {name} like to write?", "What are the writing habits of {name}?"),
        ("At what place and time does the writer {name} work best?",),
        ("{name} likes to write in {value}.", "The author {name} does most of the writing in {value}."),
        ("The pages of {family} that readers love were mostly written in {value}.",),
    ),
}
