import type { Token, TokenTable } from '../model/tokens'
import { element, tokenText } from '../presentation/elements'
import { isLive, reportToParent } from './streams'

// Choosing another target by clicking a token. The live page asks the server; a saved page shows
// the command to run.

/** The arguments of the command that made the page. */
export interface PageContents {
  command: 'trace' | 'gradient'
  model: string
  prompt: readonly Token[]
  targets: readonly Token[]
}

/** Handles clicks on target buttons within an element. */
export function listenForTargetChoice(
  where: HTMLElement,
  tokens: TokenTable,
  contents: () => PageContents,
): void {
  const dialog = element('dialog', {
    class: 'help target-dialog',
    'aria-labelledby': 'target-title',
  })
  document.body.append(dialog)
  where.addEventListener('click', (event) => {
    const id = (event.target as Element).closest<HTMLElement>('[data-target]')?.dataset.target
    if (id === undefined) return
    const token = tokens.get(Number(id))
    if (isLive()) reportToParent({ target: token })
    else explain(dialog, token, contents())
  })
}

/** Shows the command that asks a server for another target. */
function explain(dialog: HTMLDialogElement, token: Token, contents: PageContents): void {
  const line = element('textarea', {
    readonly: '',
    rows: '3',
    'aria-label': 'Command for this target',
    spellcheck: 'false',
  })
  line.value = requestFor(token, contents)
  const close = element('button', { type: 'button', class: 'button' }, 'Close')
  close.addEventListener('click', () => dialog.close())
  const known = contents.targets.flatMap((target, i) => [
    i > 0 ? ', ' : '',
    tokenText(target.label),
  ])
  dialog.replaceChildren(
    element('h2', { id: 'target-title' }, 'Result for the target ', tokenText(token.label)),
    element(
      'p',
      {},
      'This page contains only the result for ',
      ...known,
      '. To get the result for the new target, run:',
    ),
    line,
    close,
  )
  dialog.showModal()
  line.select()
}

/** The shell command, or a Python call with token ids if the text is ambiguous. */
export function requestFor(token: Token, { command, model, prompt }: PageContents): string {
  const text = prompt.map((one) => one.text).join('')
  if (isExact(text) && isExact(token.text)) {
    const where = `--model ${quoted(model)} --html page.html`
    return `januslens ${command} ${quoted(text)} --target ${quoted(token.text)} ${where}`
  }
  const call = command === 'trace' ? 'trace' : 'gradient_lens'
  const ids = prompt.map(({ id }) => id).join(', ')
  return `client.${call}([${ids}], target=[${token.id}], model=${JSON.stringify(model)})`
}

/** Whether a text is complete and can be typed into a shell. */
function isExact(text: string): boolean {
  return text !== '' && !/[\p{Cc}\p{Cf}\ufffd]/u.test(text)
}

function quoted(text: string): string {
  return /^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
}
