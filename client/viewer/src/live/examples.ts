import { element } from '../presentation/elements'
import { QUESTION, type Question } from './question'

// What the page shows before the first question: examples to click.

const EXAMPLES: readonly { title: string; text: string; question: Partial<Question> }[] = [
  {
    title: 'Trace an answer',
    text: 'Which heads and neurons produce the next token?',
    question: { ask: 'trace', prompt: 'The capital of Japan is the city of' },
  },
  {
    title: 'Watch the model speak',
    text: 'At which layer does each token become the prediction?',
    question: { ask: 'generation', prompt: 'The capital of France is', tokens: '24' },
  },
  {
    title: 'Knock out every head',
    text: 'Which heads does the answer depend on?',
    question: { ask: 'effects', prompt: 'The capital of Japan is the city of' },
  },
]

export class Examples {
  readonly element = element('section', { class: 'examples', 'aria-label': 'Examples' })

  constructor(ask: (question: Question) => void) {
    this.element.append(
      ...EXAMPLES.map(({ title, text, question }) => {
        const made = element(
          'button',
          { type: 'button', class: 'example' },
          element('strong', {}, title),
          element('span', {}, text),
          element('q', { class: 'token' }, question.prompt ?? ''),
        )
        made.addEventListener('click', () => ask({ ...QUESTION, ...question }))
        return made
      }),
    )
  }
}
