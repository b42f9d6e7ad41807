import type { Token, TokenTable } from '../model/tokens'
import { element, tokenText } from '../presentation/elements'
import { isLive, reportToParent } from './streams'

// Another target: a click on a token asks for it, on a live page the server, else a person.

/** What a page holds, as the command is told to make it. */
export interface PageContents {
  command: 'trace' | 'gradient'
  model: string
  prompt: readonly Token[]
  targets: readonly Token[]
}

/** Acts on clicks on such tokens; `held` says what the page is about. */
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

/** A page from a file cannot ask: it says how a person can. */
function explain(dialog: HTMLDialogElement, token: Token, contents: PageContents): void {
  const line = element('textarea', {
    readonly: '',
    rows: '3',
    'aria-label': 'What asks for it',
    spellcheck: 'false',
  })
  line.value = requestFor(token, contents)
  const close = element('button', { type: 'button', class: 'button' }, 'Close')
  close.addEventListener('click', () => dialog.close())
  const known = contents.targets.flatMap((target) => [tokenText(target.label), ' '])
  dialog.replaceChildren(
    element('h2', { id: 'target-title' }, 'With the target ', tokenText(token.label)),
    element('p', {}, 'This page holds the answer for ', ...known, 'alone. To ask a server:'),
    line,
    close,
  )
  dialog.showModal()
  line.select()
}

/** The command, or where a text does not say which tokens are meant, the call with their ids. */
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

/** Whether a text is whole, and can be typed into a shell. */
function isExact(text: string): boolean {
  return text !== '' && !/[\p{Cc}\p{Cf}\ufffd]/u.test(text)
}

function quoted(text: string): string {
  return /^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
}
