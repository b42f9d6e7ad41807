import { disclosure, element } from '../presentation/elements'
import { QUESTION, type Question, titleOf } from './question'

// The questions of this session, which the browser keeps for the tab.

const STORED = 'januslens-history'
const LONGEST = 30

export class History {
  private readonly summary = element('summary', {})
  private readonly list = element('ol', {})
  readonly element = disclosure('history', this.summary, this.list)
  private questions = stored()

  constructor(private readonly ask: (question: Question) => void) {
    this.draw()
  }

  /** Adds a question, or moves it to the front. */
  add(question: Question): void {
    const key = JSON.stringify(question)
    const others = this.questions.filter((other) => JSON.stringify(other) !== key)
    this.questions = [question, ...others].slice(0, LONGEST)
    sessionStorage.setItem(STORED, JSON.stringify(this.questions))
    this.draw()
  }

  private draw(): void {
    const { questions } = this
    this.element.hidden = questions.length === 0
    this.summary.textContent = `History (${questions.length})`
    this.list.replaceChildren(
      ...questions.map((question) => {
        const attributes = { type: 'button', class: 'inline', title: 'Ask this again' }
        const again = element('button', attributes, element('bdi', {}, titleOf(question)))
        again.addEventListener('click', () => {
          this.element.open = false
          this.ask(question)
        })
        return element('li', {}, again)
      }),
    )
  }
}

/** The stored questions; those of another version of the page get the fields that they lack. */
function stored(): Question[] {
  try {
    const questions = JSON.parse(sessionStorage.getItem(STORED) ?? '[]') as Question[]
    return questions.map((question) => ({ ...QUESTION, ...question }))
  } catch {
    return []
  }
}
