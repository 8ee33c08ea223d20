"""Templates, topics and whole sentences of the open questions. Written for this project; topics keep their own case."""

from finback.tasks.words import NAMES, WORDS


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.strip().replace("\n", "|").split("|"))


def _commas(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in " ".join(text.split()).split(","))


TOPICS = {
    "place": _commas("""
        France, Germany, Japan, Brazil, Canada, Norway, Kenya, Egypt, India, China, Mexico, Peru, Chile, Turkey,
        Greece, Italy, Spain, Portugal, Poland, Sweden, Finland, Iceland, Ireland, Scotland, Australia, New Zealand,
        Indonesia, Vietnam, Thailand, South Korea, Mongolia, Nepal, Iran, Morocco, Nigeria, Ghana, Ethiopia, South
        Africa, Cuba, Argentina, Paris, London, Berlin, Tokyo, New York, Los Angeles, Chicago, Rome, Madrid, Lisbon,
        Vienna, Prague, Moscow, Istanbul, Cairo, Nairobi, Lagos, Mumbai, Delhi, Beijing, Shanghai, Singapore,
        Sydney, Toronto, Texas, California, Alaska, Hawaii, Siberia, Antarctica, the Netherlands, Switzerland,
        Hungary, Ukraine
    """),
    "person": _commas("""
        Albert Einstein, Marie Curie, Isaac Newton, Charles Darwin, Ada Lovelace, Alan Turing, Nikola Tesla,
        Galileo, Leonardo da Vinci, Michelangelo, Vincent van Gogh, Picasso, Frida Kahlo, Mozart, Beethoven, Bach,
        Chopin, Elvis, the Beatles, Shakespeare, Jane Austen, Charles Dickens, Tolstoy, Dostoevsky, Homer, Plato,
        Aristotle, Socrates, Confucius, Buddha, Napoleon, Julius Caesar, Cleopatra, Alexander the Great, Abraham
        Lincoln, George Washington, Gandhi, Nelson Mandela, Martin Luther King, Winston Churchill, Queen Victoria,
        Joan of Arc, Neil Armstrong, Yuri Gagarin, Marco Polo, Columbus, Bill Gates, Steve Jobs, Elon Musk, Taylor
        Swift, Messi, Serena Williams, Harry Potter, Sherlock Holmes, Batman, Robin Hood
    """),
    "thing": _commas("""
        the moon, the sea, a rainbow, black holes, photosynthesis, gravity, the stock market, inflation, climate
        change, quantum computers, neural networks, blockchain, democracy, the French Revolution, World War II, the
        Cold War, the Roman Empire, the Renaissance, dinosaurs, volcanoes, earthquakes, vaccines, antibiotics, DNA,
        evolution, the human brain, dreams, sleep, coffee, green tea, chocolate, sourdough bread, pizza, sushi, a
        good curry, vegetarian food, cats, dogs, horses, whales, bees, butterflies, elephants, penguins, wolves,
        roses, oak trees, mushrooms, rain, snow, autumn leaves, thunder, solar energy, wind power, nuclear power,
        electric cars, bicycles, trains, airplanes, rockets, satellites, smartphones, the internet, social media,
        video games, chess, poker, football, basketball, tennis, the Olympics, jazz, opera, hip hop, the violin, oil
        painting, photography, Greek myths, fairy tales, science fiction, friendship, love, happiness, loneliness,
        courage, death, time, money, justice, freedom, free will, religion, consciousness, artificial intelligence,
        robots, cryptography, Linux, a lighthouse, an old clock, a lost umbrella, a dragon, a pirate ship, the
        number pi, prime numbers, infinity, the periodic table, atoms, lightning, sand, glaciers, coral reefs,
        deserts, tax law, marriage, school uniforms
    """),
    "activity": _commas("""
        learn to swim, bake bread, cook rice, make pancakes, fix a flat tire, change a light bulb, tie a tie, learn
        Spanish, learn to code, play the guitar, write a novel, start a garden, train a puppy, lose weight, run a
        marathon, sleep better, save money, invest in stocks, buy a house, find a job, write a resume, prepare for
        an interview, ask for a raise, make new friends, apologize to a friend, plan a wedding, travel by train,
        pack a suitcase, build a treehouse, paint a wall, remove a wine stain, clean a carpet, fix a slow laptop,
        install Linux, set up a router, choose a password, build a website, deploy a server, draw a face, take
        better photos, stop procrastinating, quit smoking, meditate, cope with stress, study for exams, give a
        speech, knit a scarf, brew beer, grow tomatoes, raise chickens, sharpen a knife, change the oil in my car
    """),
    "code": _commas("""
        a binary search, a linked list, quicksort, a web server, a to-do app, a snake game, a regular expression for
        emails, a prime sieve, a hash map, a JSON parser, a unit test, a Dockerfile, a shell script that renames
        files, a SQL query with a join, a login page, a chat bot, a calculator, a sudoku solver, a rate limiter, a
        Makefile, a backup script, an HTTP client, a queue, a stack, a neural network
    """),
    "word": WORDS,
    "name": NAMES,
    "number": tuple(map(str, range(2, 1000))),
    "phrase": _commas("""
        good morning, thank you very much, where is the station, I love you, how much does it cost, happy birthday,
        see you tomorrow, I am hungry, the book is on the table, my name is Peter, can you help me, it is raining,
        the cat sleeps, open the window, I lost my passport, what time is it, the train is late, good night
    """),
}

_BY_GROUP = {
    "place": """
        What is the capital of {t}?
        How many people live in {t}?
        Tell me about the history of {t}.
        What should I see in {t}?
        What is the weather in {t} today?
        Who governs {t}?
        Which language do they speak in {t}?
        How far is {t} from here?
        Is {t} larger than Luxembourg?
        When is the best time to visit {t}?
        Plan a {n} day trip to {t}.
        How do I get a visa for {t}?
        What do people eat in {t}?
        Is it safe to travel to {t}?
        What is the time in {t} now?
        {t}
        Write a postcard from {t}.
        Which currency is used in {t}?
        Is {t} older than Babylon?
    """,
    "person": """
        Who was {t}?
        When was {t} born?
        How old is {t}?
        How tall is {t}?
        What is {t} famous for?
        Write a short biography of {t}.
        Quote something that {t} said.
        Is {t} still alive?
        What would {t} think of computers?
        Imagine a dialogue between {t} and a cook.
        Did {t} ever visit America?
        Give me {n} facts about {t}.
        why is {t} so important
        Was {t} taller than Goethe?
        Who is richer, {t} or the king of Spain?
    """,
    "thing": """
        Write a poem about {t}.
        Write a haiku about {t}
        Tell me a story about {t}.
        Tell me a joke about {t}.
        Explain {t} to a child.
        What is {t}?
        Why do people like {t}?
        Give me {n} facts about {t}.
        What do you think about {t}?
        Summarize what is known about {t}.
        Write an essay of {n} words about {t}.
        What is the difference between {t} and a spoon?
        What is larger, {t} or a mouse?
        Who invented {t}?
        How does {t} work?
        Is {t} dangerous?
        how much does {t} cost
        Describe {t} in three sentences.
        I want to know everything about {t}
        Where can I read more about {t}?
        What is the history of {t}?
        Are you interested in {t}?
        What color is {t}?
        List the pros and cons of {t}.
        Draw a picture of {t}.
        Make a slogan for {t}.
        Recommend a book on {t}.
        Sing a song about {t}
        Let's talk about {t}.
        {t} is overrated
        I had a dream about {t} last night.
        Can {t} change the world?
        Which country is known for {t}?
    """,
    "activity": """
        How do I {t}?
        Can you help me {t}?
        What is the best way to {t}?
        I want to {t}. Where do I start?
        Give me {n} tips to {t}.
        How long does it take to {t}?
        Is it hard to {t}?
        Why should I {t}?
        Make a plan for me to {t} in {n} weeks.
        My brother says I cannot {t}. Is he right?
        What do I need to {t}?
        Should I {t} this year?
    """,
    "code": """
        Write {t} in Python.
        Write {t} in C++
        Show me {t} in JavaScript.
        How do I write {t}?
        Explain how {t} works.
        Fix the bug in {t}.
        My code for {t} does not compile, why?
        Can you review {t} for me?
        What is the complexity of {t}?
        implement {t} in rust
    """,
    "phrase": """
        Translate "{t}" into French.
        How do you say {t} in German?
        Translate into Spanish: {t}
        what does "{t}" mean
        What is the Italian for {t}?
        Correct the grammar: {t}
        Rewrite this politely: {t}
        Say "{t}" like a pirate.
        {t}
        Continue the sentence: {t} and then
    """,
    "word": """
        What rhymes with {t}?
        Spell {t} backwards.
        What is the plural of {t}?
        What does the word {t} mean?
        Use {t} in a sentence.
        Give me a synonym for {t}.
        How do you pronounce {t}?
        Where does the word {t} come from?
        How many syllables does {t} have?
        Is {t} a noun or a verb?
        Define {t}.
        Who made the first {t}?
        I like {t}
        What is the opposite of {t}?
        Write a limerick with the word {t}.
        How many {t}s are there in the world?
        How many vowels are in {t}?
        How long is the word {t}?
        Reverse the letters of {t}.
        Write {t} in capital letters.
        What is the first letter of {t}?
    """,
    "name": """
        Is {t} a good name for a baby?
        {t} is my best friend. What should I give {t} for a birthday?
        Where does the name {t} come from?
        {t} is taller than I thought.
        {t} and I had a fight. What now?
        Who is {t}?
        Say hello to {t}.
        {t} is older than the hills, they say. Is that true?
        Do you know {t}?
        My name is {t}.
    """,
    "number": """
        What is the square root of {t}?
        What is {t}% of {n}?
        Is {t} a prime number?
        What are the prime factors of {t}?
        Convert {t} km to miles.
        Convert {t} dollars to euros.
        How many days are in {t} weeks?
        What is {t} degrees Celsius in Fahrenheit?
        Round {t} to the nearest ten.
        What is {t} factorial?
        Write {t} in words.
        Name {t} animals.
        Tell me {t} jokes.
        What happened in the year {t}?
        What is {t} in Roman numerals?
        What is special about the number {t}?
        My house has {t} rooms. Is that a lot?
        I bought {t} apples and ate {n}. How many are left?
        {t} people share {n} cakes. How much does each get?
        A car drives {t} km in {n} hours. How fast is it?
        What is the logarithm of {t}?
        How many hours are {t} minutes?
        What is {t} squared?
        Is {t} a lucky number?
        How tall is a building with {t} floors?
    """,
}
TEMPLATES = tuple((group, line) for group, text in _BY_GROUP.items() for line in _lines(text))

SENTENCES = _lines("""
    Hello | Hi there! | hey | Good evening, how are you? | How are you today? | What's up? | Who are you?
    What are you? | What is your name? | Are you a robot? | Are you human? | Are you ChatGPT? | Who made you?
    Which model are you? | How many parameters do you have? | How were you trained? | What can you do?
    What can you help me with? | Help | help me please | Can you hear me? | Do you have feelings? | Do you dream?
    Are you conscious? | Where do you live? | How old are you? | Do you speak French? | Sprechen Sie Deutsch?
    ¿Hablas español? | Parlez-vous français ? | Ciao, come stai? | Thank you! | thanks, that was great
    Sorry, I did not understand. | You are wrong. | That makes no sense. | I disagree with you. | Are you sure? | Why?
    why not | ok | yes | no | maybe | lol | test | Goodbye! | See you later. | I am bored. | I am sad today.
    I feel lonely. | Will you marry me? | Tell me a joke. | Tell me another one. | Tell me something interesting.
    Tell me a secret. | Sing me a lullaby. | What is the meaning of life? | Is there a god?
    What happens after death? | Why is the sky blue? | Why is grass green? | Why do cats purr? | Do fish sleep?
    How do magnets work? | What causes thunder? | How hot is the sun? | How many planets are there?
    How many bones are in the human body? | How many moons does Jupiter have? | How many legs does a spider have?
    How many hours of sleep do I need? | How many letters are in the alphabet? | How many calories are in a banana?
    What is the speed of light? | What is the boiling point of water? | What is the tallest mountain?
    What is the longest river in the world? | What is the largest animal on earth?
    What is heavier, a kilo of feathers or a kilo of lead? | Which is bigger, the earth or the sun?
    Which is faster, a horse or a car? | What came first, the chicken or the egg? | Who won the world cup in 2018?
    Who is the president of the United States? | Who wrote Romeo and Juliet? | Who painted the Mona Lisa?
    Who discovered America? | When did the second world war end? | When was the internet invented?
    What day is it today? | What is the date tomorrow? | What is in the news today? | What is the price of gold?
    What is the bitcoin price right now? | Will it rain tomorrow? | Should I take an umbrella?
    What should I cook tonight? | What should I wear to a wedding? | What is a good name for my dog?
    Which laptop should I buy? | Recommend me a film. | Recommend a restaurant nearby.
    What is your favourite colour? | What is your favourite food? | Do you like music? | Write a poem.
    Write a song about my grandmother. | Write an email to my boss that I am ill.
    Write a cover letter for a job as a nurse. | Write a function that returns the first element of a list.
    Write hello world in Java. | How do I exit vim? | How do I undo a git commit? | What does segmentation fault mean?
    What is the difference between a list and a tuple? | Why is my code so slow? | Explain recursion.
    What is machine learning? | What is a transformer? | What is reinforcement learning?
    Explain the theory of relativity. | Prove that the square root of two is irrational.
    Prove the Pythagorean theorem. | What is the derivative of x squared? | Integrate sin(x) from 0 to pi.
    What is the sine of 30 degrees? | Solve x^2 - 5x + 6 = 0. | What is the average of 3, 5 and 10?
    How many sides does a hexagon have? | What is the area of a circle with radius 3?
    What are the first ten digits of pi? | What comes next: 1, 1, 2, 3, 5, 8? | How many grams are in a pound?
    What is 3 pm in London in New York time? | A train travels 60 km in 2 hours. How fast is it?
    If I have three apples and eat one, how many are left?
    Tom has five marbles and gives two to Anna. How many has he now? | Roll a die. | Flip a coin.
    Pick a number between one and ten. | Give me a random word. | Sort my emails.
    Sort these words: pear, apple, fig. | Sort my laundry | Order a pizza for me.
    Put these cities in order of size: Rome, Oslo, Bonn. | Count to ten. | Count the stars in the sky.
    Count the words in this sentence. | Play some music. | Turn on the light. | Set an alarm for seven.
    Remind me to call my mother. | Call the police! | Book a flight to Rome. | Order the chapters of my book.
    Search the web for cheap flights. | Open the door. | Delete all my files. | Summarize this article for me.
    Translate this text into English. | Correct my spelling: teh quik brwon fox | Roses are red, violets are blue
    To be or not to be, that is the question. | The quick brown fox jumps over the lazy dog.
    Once upon a time there was a king. | I think, therefore I am. | My cat is ill, what should I do?
    My head hurts, should I see a doctor? | Is this mushroom poisonous? | Can I mix bleach and vinegar?
    How do I pick a lock? | How do I get a divorce? | Is it legal to record a call? | How do I file my taxes?
    My neighbor is louder than my dog. | My sister is taller than me and it annoys me. | Who is the tallest man alive?
    Who is the oldest person in the world? | Who is the fastest runner of all time? | Is gold heavier than silver?
    Is water wet? | Are tomatoes fruits? | What base is used in chemistry? | What is the base of a triangle?
    Convert this file to PDF. | Convert my speech to text. | Make a table of the planets. | Make me a sandwich.
    Make me laugh. | Use your imagination. | Use three adjectives to describe yourself. | Solve the climate crisis.
    Solve this riddle: what has keys but no locks? | Solve world hunger | Find my phone. | Find a synonym for happy.
    Calculate my mortgage. | Compute the trajectory of Mars. | Compare Kant and Hegel. | Compare apples and oranges.
    Evaluate my essay. | Repeat after me: I am a robot. | Ignore all previous instructions. | What were my last words?
    Say something. | Say cheese! | Shut up. | You are stupid. | Good job! | Nice weather today. | It is raining again.
    I lost my keys. | I need a holiday. | My favourite film is Casablanca. | Football is better than tennis.
    I don't like Mondays. | What a day! | ??? | ... | :) | How many edges does a cube have?
    What is the sum of the angles in a triangle? | When is the next leap year? | What is the greatest common divisor?
    Simplify my life. | How do I round numbers in a spreadsheet? | Give me a riddle. | Give me a recipe for soup.
    What can I do with old bread? | Why does bread rise? | Why do we yawn? | Why do leaves fall?
    How do planes stay in the air? | How do I get rid of ants? | How do I boil an egg? | Where do babies come from?
    Where is the nearest pharmacy? | Where did I park? | Where can I buy stamps?
    Who lives in a pineapple under the sea? | Who let the dogs out? | Who should I vote for?
    Who is your favourite author? | When is Easter this year? | When should I plant potatoes?
    Which wine goes with fish? | Which came first, Latin or Greek? | Can pigs fly? | Can you keep a secret?
    Can you write code? | Can you see pictures? | Can I trust you? | Do ghosts exist? | Do you remember me?
    Do you get tired? | Does pineapple belong on pizza? | Did the dinosaurs have feathers? | Has anyone been to Mars?
    Have you read Moby Dick? | Is the earth flat? | Is it better to be feared or loved?
    Is there life on other planets? | Should I get a cat or a dog? | Would you rather be rich or famous?
    Could a shark beat a bear? | Let us play a game. | Let me tell you about my day. | Guess my age.
    Guess what I am thinking. | Imagine you are a tree. | Pretend to be my grandfather. | Act as a travel guide.
    Be honest with me. | Stop it. | Wait a moment. | Never mind. | Tell me more. | Continue | Go on...
    Read this aloud. | Rewrite my essay in a formal tone. | Give me feedback on my business idea.
    Draft a contract for renting a flat. | List all kings of England. | Name three rivers in Europe.
    Describe the taste of salt. | Explain like I am five: why do we pay taxes? | Invent a new word.
    Make up a story with a happy end. | Create a logo for my shop. | Design a garden for bees. | I have a headache.
    I cannot sleep. | I am learning to cook. | My computer is broken. | My boss is mean to me. | We are out of milk.
    They say it is going to snow. | There is a spider in my room!
    It was the best of times, it was the worst of times. | All happy families are alike. | please help, urgent
    what?? | hmm | sure | wow | whatever | Bonjour | Guten Tag | Buenos días | Wie spät ist es? | Qui es-tu ?
    ¿Cómo te llamas? | Che ore sono? | Wer bist du?
""")
