import { element } from './dom'

/** The keys of a page in a dialog. */
export function helpDialog(keys: readonly (readonly [string, string])[]): HTMLDialogElement {
  const rows = keys.map(([key, what]) =>
    element(
      'tr',
      {},
      element('th', { scope: 'row' }, ...key.split(' ').map((k) => element('kbd', {}, k))),
      element('td', {}, what),
    ),
  )
  const close = element('button', { type: 'button', class: 'button' }, 'Close')
  const dialog = element(
    'dialog',
    { class: 'help', 'aria-labelledby': 'help-title' },
    element('h2', { id: 'help-title' }, 'Keys'),
    element('table', {}, element('tbody', {}, ...rows)),
    close,
  )
  close.addEventListener('click', () => dialog.close())
  document.body.append(dialog)
  return dialog
}
